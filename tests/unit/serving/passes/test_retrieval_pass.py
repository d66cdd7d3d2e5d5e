"""The query pass of every form of the towers, beside the model's own user vectors. T tokens, D width."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from gr.batch import EvaluationBatch
from gr.embeddings import table_weights
from gr.errors import ServingError
from gr.models.retrieval import RetrievalModel
from gr.serving.passes.retrieval import QueryPass
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

ROWS, N, D = 41, 16, 8
HSTU: dict[str, Any] = {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 8, "v_dim": 4}
FORMS: dict[str, dict[str, Any]] = {
    "hstu": HSTU,
    "time": {**HSTU, "time_bias": True, "time_buckets": 30},
    "actual_len without bias": {**HSTU, "position_bias": False, "divisor": "actual_len"},
    "max_len and concat_ua": {**HSTU, "divisor": "max_len", "concat_ua": True},
    "divisor value, three layers": {**HSTU, "divisor_value": 3.0, "layers": 3},
    "softmax": {**HSTU, "attention": "softmax", "position_bias": False},
    "sasrec": {"kind": "sasrec", "layers": 2, "heads": 2, "ffn_dim": 24},
    "sasrec of one layer": {"kind": "sasrec", "layers": 1, "heads": 1, "ffn_dim": 8},
}


class Rows(nn.Module):
    """A table that is not quantised, with the call of PackedTables."""

    def __init__(self, weight_ED: Tensor) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(weight_ED.clone(), requires_grad=False)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return F.embedding(ids, self.weight_ED)


def model_of(tower: dict[str, Any], l2_norm: bool = True) -> RetrievalModel:
    config = tiny_config("unused", "unused", model={"dim": D}, task={"l2_norm": l2_norm})
    tree = config.model_dump()
    tree["model"]["tower"] = tower
    model = RetrievalModel(type(config).model_validate(tree), item_schema(ROWS))
    model.tables.to_empty(device="cpu")
    random = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.3
    return model.eval()


def history(T: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(T)
    return torch.randint(1, ROWS, (T,), generator=random), torch.randint(
        0, 90_000, (T,), generator=random
    ).sort().values


def user_vector(model: RetrievalModel, ids_T: Tensor, times_T: Tensor) -> Tensor:
    T = len(ids_T)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = EvaluationBatch(
        features=KeyedJaggedTensor(keys=["item_id"], values=ids_T, lengths=torch.tensor([T])),
        timestamps_T=times_T,
        query_timestamps_T=torch.cat([times_T[1:], times_T[-1:]]),
        target_ids_B=torch.zeros(1, dtype=torch.int64),
        valid_B=torch.ones(1, dtype=torch.bool),
        seen_ids=nothing,
        seen_offsets=torch.zeros(2, dtype=torch.int64),
        user_B=None,
    )
    return model.user_vectors(batch)[0]


@pytest.mark.parametrize("tower", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_as_the_model(tower: dict[str, Any]) -> None:
    model = model_of(tower)
    _compare(model, query_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["time", "max_len and concat_ua", "softmax", "sasrec"])
@torch.no_grad()
def test_traced_for_every_length_from_one(form: str) -> None:
    model = model_of(FORMS[form])
    ids_T, times_T = history(7)
    tokens = torch.export.Dim("tokens", min=1, max=1 << 16)
    shapes = ({1: tokens}, {0: tokens})
    _compare(model, torch.export.export(query_of(model), (ids_T.int()[None], times_T), dynamic_shapes=shapes).module())


def query_of(model: RetrievalModel) -> QueryPass:
    (weight_ED,) = table_weights(model).values()
    return QueryPass(model, Rows(weight_ED), features=1).eval()


def _compare(model: RetrievalModel, query: nn.Module) -> None:
    for T in (1, 2, 7, N):
        ids_T, times_T = history(T)
        expected_D = user_vector(model, ids_T, times_T)
        assert expected_D.abs().max() > 0.1
        assert torch.allclose(query(ids_T.int()[None], times_T), expected_D, rtol=1e-5, atol=1e-5)


def test_a_tower_without_a_pass_is_refused() -> None:
    model = model_of(HSTU)
    model.tower = nn.Identity()
    with pytest.raises(ServingError, match="tower Identity cannot be exported; towers that can: HSTU, SASRec"):
        QueryPass(model, nn.Identity(), features=1)

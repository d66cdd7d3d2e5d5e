"""The query pass of every form of the towers, beside the model's own user vectors. T tokens, D width."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from gr.batch import EvaluationBatch
from gr.config.towers import TOWERS
from gr.data.dataset import Dataset
from gr.data.history_batches import evaluation_batches
from gr.errors import ServingError
from gr.models.retrieval import RetrievalModel
from gr.prepare.movielens import prepare_movielens
from gr.prepare.source import Source
from gr.serving.passes.retrieval import QueryPass
from tests.support.float_tables import FloatTables
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

ROWS, N, D = 41, 16, 8
HSTU: dict[str, Any] = {"kind": "hstu", "layers": 2, "heads": 2, "qk_dim": 8, "v_dim": 4}
FORMS: dict[str, dict[str, Any]] = {
    "hstu": HSTU,
    "time": {**HSTU, "time_bias": True, "time_buckets": 30},
    "actual_len without bias": {**HSTU, "position_bias": False, "divisor": "actual_len"},
    "time and actual_len": {**HSTU, "time_bias": True, "time_buckets": 30, "divisor": "actual_len"},
    "max_len and concat_ua": {**HSTU, "divisor": "max_len", "concat_ua": True},
    "divisor value, three layers": {**HSTU, "divisor_value": 3.0, "layers": 3},
    "softmax": {**HSTU, "attention": "softmax", "position_bias": False},
    "sasrec": {"kind": "sasrec", "layers": 2, "heads": 2, "ffn_dim": 24},
    "sasrec of one layer": {"kind": "sasrec", "layers": 1, "heads": 1, "ffn_dim": 8},
    "stu": {"kind": "stu", "layers": 2, "heads": 2, "qk_dim": 8, "v_dim": 4},
    "stu, window, group norm": {
        **{"kind": "stu", "layers": 3, "heads": 2, "qk_dim": 4, "v_dim": 6, "group_norm": True, "divisor": 5.0},
        **{"max_attn_len": 5, "min_full_attn_seq_len": 2},
    },
    "llama": {"kind": "llama", "layers": 2, "heads": 2, "ffn_dim": 12},
    "llama, shared keys": {"kind": "llama", "layers": 1, "heads": 4, "kv_heads": 1, "ffn_dim": 12, "rope_theta": 50.0},
}


def model_of(tower: dict[str, Any], l2_norm: bool = True) -> RetrievalModel:
    config = tiny_config("unused", "unused", model={"dim": D}, task={"l2_norm": l2_norm})
    tree = config.model_dump()
    tree["model"]["tower"] = tower
    return filled(RetrievalModel(type(config).model_validate(tree), item_schema(ROWS)), std=0.3)


def filled(model: RetrievalModel, std: float) -> RetrievalModel:
    model.tables.to_empty(device="cpu")
    random = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) * std
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


def test_every_registered_tower_has_a_form_here() -> None:
    assert {tower["kind"] for tower in FORMS.values()} == set(TOWERS)


@pytest.mark.slow
@pytest.mark.data
@torch.no_grad()
def test_the_histories_of_movielens(test_data: Path, tmp_path: Path) -> None:
    """Every registered tower, as it is configured by default, on the histories of all test users."""
    prepare_movielens("movielens-100k", Source(test_data / "ml-100k"), tmp_path)
    dataset = Dataset.open(tmp_path)
    for kind in TOWERS:
        config = tiny_config(tmp_path, tmp_path, model={"dim": 32}, data={"max_length": 200}, task={"temperature": 1.0})
        tree = config.model_dump()
        tree["model"]["tower"] = {"kind": kind}
        model = filled(RetrievalModel(type(config).model_validate(tree), dataset.schema), std=0.1)
        query, furthest, users = query_of(model), 0.0, 0
        batches = evaluation_batches(dataset, config.data, target_from_end=1, global_batch_size=128, filter_seen="none")
        for batch in batches:
            vectors_BD, history = model.user_vectors(batch), batch.features["item_id"]
            for start, stop, vector_D in zip(history.offsets(), history.offsets()[1:], vectors_BD, strict=False):
                if stop == start:
                    continue
                own = slice(int(start), int(stop))
                answer_D = query(history.values()[own].int()[None], batch.timestamps_T[own])
                furthest, users = max(furthest, float((answer_D - vector_D).abs().max())), users + 1
        assert users == 943 and furthest <= 5e-6, (kind, users, furthest)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["time", "max_len and concat_ua", "softmax", "sasrec", "stu, window, group norm", "llama, shared keys"]
)
@torch.no_grad()
def test_traced_for_every_length_from_one(form: str) -> None:
    model = model_of(FORMS[form])
    ids_T, times_T = history(7)
    tokens = torch.export.Dim("tokens", min=1, max=1 << 16)
    shapes = ({1: tokens}, {0: tokens})
    _compare(model, torch.export.export(query_of(model), (ids_T.int()[None], times_T), dynamic_shapes=shapes).module())


def query_of(model: RetrievalModel) -> QueryPass:
    return QueryPass(model, FloatTables(model, ["item_id"])).eval()


def _compare(model: RetrievalModel, query: nn.Module) -> None:
    for T in (1, 2, 7, N):
        ids_T, times_T = history(T)
        expected_D = user_vector(model, ids_T, times_T)
        assert expected_D.abs().max() > 0.1
        assert torch.allclose(query(ids_T.int()[None], times_T), expected_D, rtol=1e-5, atol=1e-5)


def test_a_tower_without_a_pass_is_refused() -> None:
    model = model_of(HSTU)
    model.tower = nn.Identity()
    with pytest.raises(ServingError, match="a Identity tower is not served: those of kind hstu, llama, sasrec and stu"):
        QueryPass(model, nn.Identity())

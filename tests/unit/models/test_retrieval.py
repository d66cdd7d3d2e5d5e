"""The retrieval model against the naive padded one, and what evaluation reads of it.

B examples, N padded length, S negatives, D width.
"""

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from benchmarks.naive import NaiveRetriever
from gr.batch import EvaluationBatch, RetrievalBatch
from gr.dist import World
from gr.models.retrieval import RetrievalModel
from gr.tasks import Candidates, CandidateSampler
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ROWS, D, N, S, TEMPERATURE = 31, 8, 7, 5, 0.2
HISTORIES = [[3, 9, 9, 4], [], [30], [1, 2, 3, 4, 5, 6, 7]]
TARGETS = [[9, 9, 4, 5], [], [1], [2, 3, 4, 5, 6, 7, 8]]


def build(*, precision: str = "fp32", **tower: object) -> RetrievalModel:
    """Filled with weights of a size at which every part matters."""
    config = tiny_config(
        Path("unused"),
        Path("unused"),
        model={
            "dim": D,
            "input_dropout": 0.0,
            "tower": {
                "kind": "hstu",
                "layers": 2,
                "qk_dim": D,
                "v_dim": D,
                "dropout": 0.0,
                "divisor_value": 9.0,
                **tower,
            },
        },
        task={"temperature": TEMPERATURE, "negatives": {"kind": "per_position", "count": S}},
        trainer={"steps": 1, "precision": precision},
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": N})})
    model = RetrievalModel(config, item_schema(ROWS))
    model.tables.to_empty(device="cpu")
    random = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.3
    return model


def kjt(histories: list[list[int]]) -> KeyedJaggedTensor:
    lengths = torch.tensor([len(history) for history in histories])
    return KeyedJaggedTensor(
        keys=["item_id"], values=torch.tensor(list(chain(*histories)), dtype=torch.int64), lengths=lengths
    )


def training_batch() -> tuple[RetrievalBatch, Candidates]:
    batch = RetrievalBatch(kjt(HISTORIES), torch.tensor(list(chain(*TARGETS))), None, None, 0)
    config = tiny_config(Path("unused"), Path("unused"), task={"negatives": {"kind": "per_position", "count": S}})
    corpus = torch.arange(1, ROWS).numpy()
    return batch, CandidateSampler(config.task, corpus, corpus, seed=1).draw(batch, 0, ALONE, 0)


def padded(rows: list[list[int]]) -> Tensor:
    return torch.tensor([row + [0] * (N - len(row)) for row in rows])


def naive_of(model: RetrievalModel) -> NaiveRetriever:
    naive = NaiveRetriever(ROWS, D, N, layers=2, dropout=0.0, divisor=9.0)
    with torch.no_grad():
        naive.items.weight.copy_(model.tables.embeddings["item_id"].weight)
        naive.position.copy_(model.position)
        for mine, theirs in zip(naive.layers, model.tower.layers, strict=True):
            mine.uvqk.copy_(theirs.uvqk)
            mine.position_bias.copy_(theirs.position_bias)
            mine.output.load_state_dict(theirs.output.state_dict())
    return naive


def test_loss_and_gradients_equal_the_naive_model() -> None:
    """The same weights, batch and negatives, some of which are the target."""
    model = build()
    naive = naive_of(model)
    batch, candidates = training_batch()
    assert candidates.negative_TS is not None
    negatives_TS = candidates.ids_K[candidates.negative_TS]
    negatives_TS[:3, 1] = batch.target_ids_T[:3]
    candidates.negative_TS[:3, 1] = candidates.positive_T[:3]
    negatives_BNS = torch.zeros(len(HISTORIES), N, S, dtype=torch.int64)
    negatives_BNS[padded(HISTORIES) > 0] = negatives_TS
    loss = model(batch, candidates)
    wanted = naive(padded(HISTORIES), padded(TARGETS), negatives_BNS, TEMPERATURE) * len(batch.target_ids_T)
    assert wanted > 10 and abs(float((loss - wanted).detach())) < 1e-4
    loss.backward()
    wanted.backward()
    pairs = {
        "table": (model.tables.embeddings["item_id"].weight, naive.items.weight),
        "position": (model.position, naive.position),
    }
    for i, (mine, theirs) in enumerate(zip(model.tower.layers, naive.layers, strict=True)):
        pairs |= {f"{i}.{name}": (p, theirs.get_parameter(name)) for name, p in mine.named_parameters()}
    assert len(pairs) == 2 + 2 * 4
    for name, (parameter, reference) in pairs.items():
        scale = reference.grad.abs().max()
        assert scale > 1e-3 and (parameter.grad - reference.grad).abs().max() < 1e-4 * scale, name


def evaluation_batch(histories: list[list[int]]) -> EvaluationBatch:
    B = len(histories)
    return EvaluationBatch(
        kjt(histories),
        None,
        None,
        target_ids_B=torch.ones(B, dtype=torch.int64),
        valid_B=torch.ones(B, dtype=torch.bool),
        seen_ids=torch.empty(0, dtype=torch.int64),
        seen_offsets=torch.zeros(B + 1, dtype=torch.int64),
    )


@torch.no_grad()
def test_queries_are_the_outputs_at_the_newest_tokens() -> None:
    model = build().eval()
    got = model.queries(evaluation_batch([[], *HISTORIES, []]))
    assert got.shape == (6, D) and got.dtype == torch.float32
    assert (got[[0, 2, 5]] == 0).all(), "no history"
    for row, history in ((1, HISTORIES[0]), (3, HISTORIES[2]), (4, HISTORIES[3])):
        assert torch.allclose(got[row], model.queries(evaluation_batch([history]))[0], atol=1e-6)
    assert (model.queries(evaluation_batch([[], []])) == 0).all()


@torch.no_grad()
def test_evaluation_scores_what_training_compares() -> None:
    """The loss of the one position of one history, from the query and the item vectors that evaluation reads."""
    model = build().eval()
    candidates = Candidates(torch.tensor([4, 9, 12, 30]), torch.tensor([2]), negative_TS=torch.tensor([[3, 0, 0]]))
    batch = RetrievalBatch(kjt([[30]]), torch.tensor([12]), None, None, 0)
    cosine = torch.nn.functional.cosine_similarity(
        model.queries(evaluation_batch([[30]])), model.item_vectors(torch.tensor([12, 30, 4, 4]))
    )
    expected = -(cosine / TEMPERATURE).log_softmax(0)[0]
    assert float(model(batch, candidates)) == pytest.approx(float(expected), abs=1e-5)


def test_item_vectors() -> None:
    model = build()
    ids = torch.tensor([5, 30, 5])
    assert torch.equal(model.item_vectors(ids), model.tables.embeddings["item_id"].weight[ids])
    assert model.item_vectors(ids[:0]).shape == (0, D)


def test_positions_count_from_the_oldest_event() -> None:
    """The newest of a history of 3 reads row 2 of the position table, whatever stands before it in the batch."""
    model = build()
    model.queries(evaluation_batch([[4, 4, 4, 4, 4], [7, 8, 9]]))[1].sum().backward()
    used = model.position.grad.abs().sum(1) > 0
    assert used.tolist() == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("tower", [{}, {"concat_ua": True, "heads": 2}], ids=["hstu", "ua"])
def test_bf16_is_near_fp32(tower: dict) -> None:
    """Only the tower runs in bfloat16; the loss and the table's gradient are float32."""
    batch, candidates = training_batch()
    losses = {}
    for precision in ("fp32", "bf16"):
        model = build(precision=precision, **tower)
        losses[precision] = model(batch, candidates)
        losses[precision].backward()
        assert losses[precision].dtype == model.tables.embeddings["item_id"].weight.grad.dtype == torch.float32
    assert losses["fp32"] != losses["bf16"]
    assert float(losses["bf16"]) == pytest.approx(float(losses["fp32"]), rel=0.02)

"""Batches move between devices as a whole."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import ITEM_FEATURE, EvaluationBatch, Packed, RankingBatch, RetrievalBatch, TabularBatch

FEATURES = KeyedJaggedTensor(keys=[ITEM_FEATURE], values=torch.tensor([4, 5, 6]), lengths=torch.tensor([2, 0, 1]))
TIMES = torch.tensor([10, 20, 30])
TRAINING = RetrievalBatch(FEATURES, torch.tensor([5, 6, 7]), TIMES, None, first_example=48)
EVALUATION = EvaluationBatch(
    FEATURES,
    None,
    TIMES,
    target_ids_B=torch.tensor([9, 0, 8]),
    valid_B=torch.tensor([True, False, True]),
    seen_ids=torch.tensor([4, 5, 6]),
    seen_offsets=torch.tensor([0, 2, 2, 3]),
)


TABULAR = TabularBatch(torch.rand(3, 2), FEATURES, torch.tensor([0.0, 1.0, 0.0]), first_example=6)


@pytest.mark.parametrize("batch", [TRAINING, EVALUATION, TABULAR], ids=["training", "evaluation", "tabular"])
def test_to_moves_every_tensor_and_keeps_the_rest(batch: RetrievalBatch | EvaluationBatch | TabularBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert type(moved) is type(batch)
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype), field.name
            assert before.device.type == "cpu", "the batch itself must not change"
        elif isinstance(before, KeyedJaggedTensor):
            assert after.values().device.type == after.lengths().device.type == "meta"
            assert after.keys() == before.keys() and after.stride() == before.stride()
        else:
            assert after == before, field.name


HISTORIES = RankingBatch(
    features=KeyedJaggedTensor(
        keys=[ITEM_FEATURE, "category", "country"],
        values=torch.tensor([4, 5, 6, 7, 8, 9, 41, 42]),
        lengths=torch.tensor([2, 0, 1, 2, 0, 1, 1, 0, 1]),
    ),
    actions_T=torch.tensor([1, 0, 3]),
    labels_TC=torch.tensor([[0.1, -0.0], [float("inf"), 1e-45], [3.4e38, 0.5]]),
    timestamps_T=TIMES,
    numeric_BK=torch.tensor([[0.3], [0.0], [-7.25]]),
    user_B=torch.tensor([100, 101, 102]),
    scored_B=torch.tensor([1, 0, 1]),
    scored=2,
    first_example=12,
    contextual=1,
)


@pytest.mark.parametrize("times", [TIMES, None], ids=["times", "no times"])
@pytest.mark.parametrize("batch", [TRAINING, HISTORIES], ids=["sequences", "histories"])
def test_packed_and_unpacked(batch: RetrievalBatch | RankingBatch, times: Tensor | None) -> None:
    """The same bits; and of other examples, what they have."""
    changes = {"timestamps_T": times} | ({"query_timestamps_T": times} if batch is TRAINING else {})
    batch = replace(batch, **changes)
    again = batch.unpack(batch.pack())
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(again, field.name)
        if isinstance(before, Tensor):
            assert before.dtype == after.dtype and torch.equal(before, after), field.name
        elif isinstance(before, KeyedJaggedTensor):
            assert before.keys() == after.keys() and torch.equal(before.values(), after.values())
            assert torch.equal(before.lengths(), after.lengths())
        else:
            assert before == after, field.name
    packed = batch.pack()
    last = batch.unpack(Packed(packed.lengths_B[2:], packed.examples_BG[2:], packed.tokens_TF[2:]))
    assert last.features[ITEM_FEATURE].values().tolist() == [6] and last.features.stride() == 1
    if isinstance(last, RankingBatch):
        assert last.features["country"].values().tolist() == [42] and last.scored == 1
        assert torch.equal(last.labels_TC, HISTORIES.labels_TC[2:]) and last.user_B.tolist() == [102]


def test_padded_rows_look_nothing_up() -> None:
    """So they are no lookups of id 0, which a counter of ids would count."""
    sparse = KeyedJaggedTensor(["a", "b"], torch.arange(1, 7), lengths=torch.tensor([1, 1, 2, 2]))
    batch = TabularBatch(torch.ones(2, 3), sparse, torch.ones(2), 0)
    padded = batch.padded(4, [1, 2])
    assert padded.sparse.values().tolist() == [1, 2, 3, 4, 5, 6]
    assert padded.sparse.lengths().tolist() == [1, 1, 0, 0, 2, 2, 0, 0]
    assert padded.dense_BN[2:].eq(0).all() and padded.dense_BN.shape == (4, 3)
    assert batch.padded(2, [1, 2]) is batch

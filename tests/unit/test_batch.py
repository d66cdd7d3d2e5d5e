"""Batches move between devices as a whole."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import ITEM_FEATURE, EvaluationBatch, SequenceBatch, TabularBatch

FEATURES = KeyedJaggedTensor(keys=[ITEM_FEATURE], values=torch.tensor([4, 5, 6]), lengths=torch.tensor([2, 0, 1]))
TIMES = torch.tensor([10, 20, 30])
TRAINING = SequenceBatch(FEATURES, torch.tensor([5, 6, 7]), TIMES, None, first_example=48)
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
def test_to_moves_every_tensor_and_keeps_the_rest(batch: SequenceBatch | EvaluationBatch | TabularBatch) -> None:
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

"""Evaluation covers every user once, at any world size. The epochs of training are tested in test_loader.py."""

import pytest

from gr.config.histories import HistoryDataConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import evaluation_batches
from gr.errors import ConfigError

from .conftest import USERS


def test_unequal_shares_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="is not divisible by the world size 3"):
        evaluation_batches(
            dataset,
            HistoryDataConfig(path="x"),
            target_from_end=1,
            global_batch_size=4,
            filter_seen="all",
            world_size=3,
        )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_covers_every_user_once(dataset: Dataset, world_size: int) -> None:
    seen, counts = [], set()
    for rank in range(world_size):
        batches = evaluation_batches(
            dataset,
            HistoryDataConfig(path="x", max_length=3),
            target_from_end=2,
            global_batch_size=8,
            filter_seen="all",
            rank=rank,
            world_size=world_size,
        )
        epoch = list(batches)
        counts.add(len(epoch))
        assert len(batches) == len(epoch)
        for batch in epoch:
            assert batch.features.stride() == len(batch.valid_B) == 8 // world_size
            seen += (batch.target_ids_B[batch.valid_B] - 1).tolist()
        again = [batch.target_ids_B.tolist() for batch in batches]
        assert again == [batch.target_ids_B.tolist() for batch in epoch]
    assert len(counts) == 1
    assert seen == [u for u in range(USERS) if u % 5 != 0]  # users of two events have no history before the target


def test_evaluation_counts_users_without_history(dataset: Dataset) -> None:
    batches = evaluation_batches(
        dataset, HistoryDataConfig(path="x", max_length=3), target_from_end=2, global_batch_size=8, filter_seen="window"
    )
    valid = sum(int(batch.valid_B.sum()) for batch in batches)
    assert batches.counters()["users_without_history"] == 8 == USERS - valid

"""One pass over the users, for an evaluation. B users of a batch on this rank."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from gr.config.histories import HistoryDataConfig
from gr.data.collate import Counts, Rows, collate_evaluation
from gr.data.dataset import Dataset, Histories
from gr.data.loader import BatchSource, rank_batch_size
from gr.logging import get_logger, log_once

log = get_logger(__name__)


class UserBatches(BatchSource[Histories, Any]):
    """One pass over the users, in file order: every iteration starts again, and has len() batches on every rank.

    A rank reads users [rank*N/R, (rank+1)*N/R). Every rank gets the same number of batches, filled up with rows that
    do not exist (group -1).
    """

    stop: int
    capacity = 1

    def __init__(
        self,
        dataset: Dataset,
        config: HistoryDataConfig,
        collate: Callable[[Rows], tuple[Any, Counts]],
        *,
        columns: Sequence[str] | None = None,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """global_batch_size: users a step over all ranks. Raises ConfigError if the world size does not divide it."""
        self._size = rank_batch_size("evaluation.global_batch_size", global_batch_size, world_size)
        self._dataset, self._config, self._collate, self._columns = dataset, config, collate, columns
        bounds = [r * dataset.rows // world_size for r in range(world_size + 1)]
        self._first_row, self._stop_row = bounds[rank], bounds[rank + 1]
        self._starts = np.concatenate([[0], np.cumsum(dataset.row_counts)])
        self.stop = max(-(-(stop - start) // self._size) for start, stop in pairwise(bounds))
        self.read_threads = config.read_threads
        self._counts = Counts()

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[Any]:
        self._counts = Counts()
        for batch, counts in self.batches(0, self.stop):
            self._counts += counts
            if counts.without_target:
                log_once(log, f"{self._dataset.path}: some users have no event before the target; not evaluated")
            yield batch

    def counters(self) -> dict[str, int]:
        """Bad rows emptied, tokens older than the window and users not evaluated: on this rank, in the latest
        iteration.
        """
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": self._counts.truncated_tokens,
            "users_without_history": self._counts.without_target,
        }

    def read(self, row_group: int) -> Histories:
        return self._dataset.read_row_group(row_group, self._columns, self._config.on_bad_row)

    def rows(self, cursor: int) -> tuple[np.ndarray, np.ndarray]:
        row_B = self._first_row + cursor * self._size + np.arange(self._size)
        is_row_B = row_B < self._stop_row
        group_B = np.where(is_row_B, np.searchsorted(self._starts, row_B, side="right") - 1, -1)
        return group_B, np.where(is_row_B, row_B - self._starts[group_B], 0)

    def collate(
        self, cursor: int, groups: Sequence[Histories], group_B: np.ndarray, row_B: np.ndarray
    ) -> tuple[Any, Counts]:
        return self._collate(Rows(groups, group_B, row_B, self._dataset.schema.timestamps))


def evaluation_batches(
    dataset: Dataset,
    config: HistoryDataConfig,
    *,
    target_from_end: Literal[1, 2],
    global_batch_size: int,
    filter_seen: Literal["window", "all", "none"],
    rank: int = 0,
    world_size: int = 1,
) -> UserBatches:
    """Batches with the one held-out item of each user: the newest (target_from_end 1: test) or the one before it (2:
    validation). Rows that only fill up a batch are not valid. Raises ConfigError as UserBatches does.
    """
    collate = partial(
        collate_evaluation, max_length=config.max_length, target_from_end=target_from_end, filter_seen=filter_seen
    )
    return UserBatches(dataset, config, collate, global_batch_size=global_batch_size, rank=rank, world_size=world_size)

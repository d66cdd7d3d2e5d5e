"""Batches of user histories: endless epochs to train on, one pass over the users to evaluate on.

B examples of a batch on this rank.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from gr.config.histories import HistoryDataConfig
from gr.data.collate import Counts, Rows, collate_evaluation, collate_train
from gr.data.dataset import Dataset, Histories
from gr.data.loader import BatchSource, Places, ResumableSource, checksums, dealt, rank_batch_size
from gr.data.order import TrainingOrder, owned_lanes
from gr.data.stochastic_length import Draws
from gr.errors import ConfigError
from gr.logging import get_logger, log_once

log = get_logger(__name__)


class HistoryEpochs(ResumableSource[Histories, Any]):
    """Endless epochs over the users, in the order of docs/design/data-order.md.

    The cursor is the position: examples that each lane has given before a batch. The batch size is not part of the
    identity, and may change when a run resumes.
    """

    cursor_name, order_name = "position", "data order"
    identity_keys = "data folder, seed, data.lanes and data.shuffle"

    def __init__(
        self,
        dataset: Dataset,
        config: HistoryDataConfig,
        collate: Callable[[Rows, Draws, int], tuple[Any, Counts]] | None = None,
        *,
        columns: Sequence[str] | None = None,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """collate: makes a batch of rows, their draws and the number of the global batch's first example; None: for
        retrieval. columns: those it reads; None: those of a sequence model. global_batch_size: examples over all ranks.

        Raises ConfigError where the world size does not divide data.lanes, data.lanes does not divide the batch, or
        there are fewer rows than lanes.
        """
        if global_batch_size % config.lanes:
            raise ConfigError(
                f"trainer.global_batch_size={global_batch_size} is not divisible by data.lanes={config.lanes}; set one "
                "to a multiple or divisor of the other"
            )
        self._dataset, self._config, self._columns = dataset, config, columns
        self._collate = collate or partial(collate_train, config=config)
        self._lanes = owned_lanes(config.lanes, rank, world_size)
        self._order = TrainingOrder(dataset.row_counts, lanes=config.lanes, seed=seed, shuffle=config.shuffle)
        self.stride = global_batch_size // config.lanes
        self.read_threads, self.prefetch = config.read_threads, config.prefetch
        self.capacity = 2 * len(self._lanes) + config.read_threads
        order = {"lanes": config.lanes, "seed": seed, "shuffle": int(config.shuffle), "rows": self._order.rows}
        self.identity = {**order, **checksums(dataset.row_counts, dataset.schema)}

    def steps(self, epochs: int) -> int:
        longest = max(self._order.lane_length(lane) for lane in range(self._order.lanes))
        return -(-epochs * longest // self.stride)

    def read(self, row_group: int) -> Histories:
        return self._dataset.read_row_group(row_group, self._columns, self._config.on_bad_row)

    def rows(self, cursor: int) -> Places:
        by_lane = [self._order.lane_rows(lane, cursor, self.stride) for lane in self._lanes]
        return self._order.locate(np.concatenate(by_lane))

    def collate(self, cursor: int, groups: Sequence[Histories], places: Places) -> tuple[Any, Counts]:
        rows = Rows(groups, *places, self._dataset.schema.timestamps)
        first_example = cursor * self._order.lanes
        own_B = self._lanes.start * self.stride + np.arange(len(rows.row_B))  # a rank's lanes follow one another
        return self._collate(rows, Draws(self._order.seed, first_example + own_B), first_example)

    def counters(self, counts: Counts) -> dict[str, int]:
        """Distinct bad rows emptied (including those read ahead); tokens older than the window; examples without a
        target; events that stochastic length and event dropout left out, and all that stayed.
        """
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": counts.truncated_tokens,
            "examples_without_target": counts.without_target,
            "subsampled_tokens": counts.subsampled_tokens,
            "tokens": counts.tokens,
        }

    def log(self, counts: Counts) -> None:
        config = self._config
        if counts.truncated_tokens:
            log_once(log, f"histories longer than data.max_length={config.max_length} are cut to their newest events")
        if counts.without_target:
            log_once(log, f"some users have no target after data.train_holdout={config.train_holdout}: empty examples")
        if self._dataset.bad_rows:
            log_once(log, f"{self._dataset.path} has bad rows; data.on_bad_row=skip empties them")


class UserBatches(BatchSource[Histories, Any]):
    """One pass over the users, in file order: every iteration starts again, and has len() batches on every rank.

    A rank reads users [rank*N/R, (rank+1)*N/R). Every rank gets the same number of batches, filled up with rows that
    do not exist (group -1).
    """

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
        rows_N: np.ndarray | None = None,
    ) -> None:
        """global_batch_size: users a step over all ranks. rows_N: the rows of the users to read; None: all.

        Raises ConfigError if the world size does not divide the batch.
        """
        self._size = rank_batch_size("evaluation.global_batch_size", global_batch_size, world_size)
        self._dataset, self._config, self._collate, self._columns = dataset, config, collate, columns
        self._rows_N = np.arange(dataset.rows) if rows_N is None else rows_N
        bounds, self.stop = dealt(len(self._rows_N), world_size, self._size)
        self._first_row, self._stop_row = bounds[rank], bounds[rank + 1]
        self._starts = np.concatenate([[0], np.cumsum(dataset.row_counts)])
        self.read_threads = config.read_threads
        self._counts = Counts()

    @property
    def own_rows(self) -> int:
        """The users of this rank."""
        return self._stop_row - self._first_row

    def __iter__(self) -> Iterator[Any]:
        self._counts = Counts()
        for batch, counts in self.batches(0, self.stop):
            self._counts += counts
            if counts.without_target:
                log_once(log, f"{self._dataset.path}: some users have no event before the target; not evaluated")
            yield batch

    def counters(self) -> dict[str, int]:
        """Bad rows emptied, tokens older than the window, users not evaluated: this rank's, in the latest iteration."""
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": self._counts.truncated_tokens,
            "users_without_history": self._counts.without_target,
        }

    def read(self, row_group: int) -> Histories:
        return self._dataset.read_row_group(row_group, self._columns, self._config.on_bad_row)

    def rows(self, cursor: int) -> Places:
        place_B = self._first_row + cursor * self._size + np.arange(self._size)
        exists_B = place_B < self._stop_row
        row_B = np.zeros_like(place_B)
        row_B[exists_B] = self._rows_N[place_B[exists_B]]
        group_B = np.where(exists_B, np.searchsorted(self._starts, row_B, side="right") - 1, -1)
        return group_B, np.where(exists_B, row_B - self._starts[group_B], 0)

    def collate(self, cursor: int, groups: Sequence[Histories], places: Places) -> tuple[Any, Counts]:
        return self._collate(Rows(groups, *places, self._dataset.schema.timestamps))


def evaluation_batches(
    dataset: Dataset,
    config: HistoryDataConfig,
    *,
    target_from_end: int,
    global_batch_size: int,
    filter_seen: Literal["window", "all", "none"],
    rank: int = 0,
    world_size: int = 1,
    rows_N: np.ndarray | None = None,
) -> UserBatches:
    """Batches with the one held-out item of each user: the newest (target_from_end 1: test), the one before it (2:
    validation) and so on, or none (0). Rows that only fill up a batch are not valid. rows_N: of the users to read;
    None: all. Raises ConfigError as UserBatches does.
    """
    collate = partial(
        collate_evaluation,
        max_length=config.max_length,
        target_from_end=target_from_end,
        filter_seen=filter_seen,
        users=True,
    )
    return UserBatches(
        dataset,
        config,
        collate,
        columns=["user_id", *["timestamps"] * dataset.schema.timestamps],
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        rows_N=rows_N,
    )

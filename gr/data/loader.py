"""Batches for one rank: TrainLoader is endless and can resume, UserBatches goes over the users once.

Row groups are decoded ahead by a pool of threads; one more thread collates training batches into a bounded queue.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol, Self

import numpy as np

from gr.batch import RetrievalBatch
from gr.config.histories import HistoryDataConfig
from gr.data.collate import Counts, Rows, collate_evaluation, collate_train
from gr.data.dataset import Dataset, Histories
from gr.data.order import TrainingOrder, owned_lanes
from gr.data.prefetch import Ahead, RowGroupCache
from gr.data.stochastic_length import Draws
from gr.errors import CheckpointError, ConfigError
from gr.logging import get_logger, log_once

log = get_logger(__name__)


class TrainCollate(Protocol):
    """Makes the batches of one kind of training. columns: those it reads; None: those of a sequence model."""

    @property
    def columns(self) -> Sequence[str] | None: ...

    def __call__(self, rows: Rows, draws: Draws, first_example: int) -> tuple[Any, Counts]: ...


@dataclass(frozen=True)
class RetrievalCollate:
    config: HistoryDataConfig
    columns: Sequence[str] | None = None

    def __call__(self, rows: Rows, draws: Draws, first_example: int) -> tuple[RetrievalBatch, Counts]:
        return collate_train(rows, self.config, draws, first_example=first_example)


def _cache(
    dataset: Dataset, config: HistoryDataConfig, capacity: int, columns: Sequence[str] | None = None
) -> RowGroupCache[Histories]:
    read = partial(dataset.read_row_group, columns=columns, on_bad_row=config.on_bad_row)
    return RowGroupCache(read, threads=config.read_threads, capacity=capacity)


@dataclass(frozen=True)
class _Planned:
    """A batch whose row groups are being decoded. first: position or number of the batch."""

    first: int
    groups: "list[Future[Histories]]"
    group_B: np.ndarray
    row_B: np.ndarray

    def rows(self, timestamps: bool) -> Rows:
        return Rows([group.result() for group in self.groups], self.group_B, self.row_B, timestamps)


def _plan(cache: RowGroupCache, first: int, group_B: np.ndarray, row_B: np.ndarray) -> _Planned:
    return _Planned(first, *cache.request_all(group_B), row_B)


class TrainLoader:
    """Endless iterator of this rank's part of each global batch, in the order of docs/design/data-order.md.

    global_batch_size: examples a step over all ranks. Counters and state_dict() speak of batches handed out, not of
    those collated ahead. Errors in the reading threads are raised by next(). Raises ConfigError when the world size
    does not divide data.lanes, data.lanes does not divide the batch, or there are fewer rows than lanes.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: HistoryDataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        collate: TrainCollate | None = None,
    ) -> None:
        """collate: unset makes batches for retrieval."""
        if global_batch_size % config.lanes:
            raise ConfigError(
                f"trainer.global_batch_size={global_batch_size} is not divisible by data.lanes={config.lanes}; set one "
                "to a multiple or divisor of the other"
            )
        self._dataset, self._config = dataset, config
        self._collate = collate or RetrievalCollate(config)
        self._lanes = owned_lanes(config.lanes, rank, world_size)
        self._per_lane = global_batch_size // config.lanes
        self._order = TrainingOrder(dataset.row_counts, lanes=config.lanes, seed=seed, shuffle=config.shuffle)
        self._position = 0
        self._counts = Counts()
        self._ahead: Ahead[tuple[Any, Counts]] | None = None
        self._closed = False
        self.wait_seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """The next batch. Time spent here waiting for it is added to wait_seconds."""
        if self._closed and (self._ahead is None or self._ahead.error is None):
            raise StopIteration
        if self._ahead is None:
            self._ahead = Ahead(self._batches(self._position), self._config.prefetch)
        waited = self._ahead.wait_seconds
        batch, counts = self._ahead.take()
        self.wait_seconds += self._ahead.wait_seconds - waited
        self._position += self._per_lane
        self._counts += counts
        self._tell(counts)
        return batch

    def counters(self) -> dict[str, int]:
        """Of this rank, since construction: distinct bad rows emptied (including read ahead), tokens older than the
        window, examples without a target; events that stochastic length left out, and all that were kept."""
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": self._counts.truncated_tokens,
            "examples_without_target": self._counts.without_target,
            "subsampled_tokens": self._counts.subsampled_tokens,
            "tokens": self._counts.tokens,
        }

    def state_dict(self) -> dict[str, int]:
        """position: examples each lane has given. The rest identifies the order; the same on all ranks."""
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch handed out before the state was saved, on any world size that divides the
        lanes.

        Raises CheckpointError if lanes, seed, shuffle, rows or row groups differ: they are another order.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise CheckpointError(
                    f"the checkpoint's data order has {name}={state.get(name)}, this run has {name}={mine}; resume "
                    "with the same data folder, seed, data.lanes and data.shuffle, or start a new run"
                )
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self._position = int(state["position"])

    def close(self) -> None:
        """Stop the threads. Safe to call twice; next() then raises StopIteration."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, int]:
        layout = np.asarray(self._dataset.row_counts, dtype=np.int64).tobytes()
        schema = self._dataset.schema.model_dump_json().encode()
        order = self._order
        return {
            "lanes": order.lanes,
            "seed": order.seed,
            "shuffle": int(order.shuffle),
            "rows": order.rows,
            "row_groups": zlib.crc32(layout),
            "schema": zlib.crc32(schema),
        }

    def _tell(self, counts: Counts) -> None:
        if counts.truncated_tokens:
            log_once(
                log, f"histories longer than data.max_length={self._config.max_length} are cut to their newest events"
            )
        if counts.without_target:
            log_once(
                log, f"some users have no target after data.train_holdout={self._config.train_holdout}: empty examples"
            )
        if self._dataset.bad_rows:
            log_once(log, f"{self._dataset.path} has bad rows; data.on_bad_row=skip empties them")

    def _batches(self, position: int) -> Iterator[tuple[Any, Counts]]:
        capacity = 2 * len(self._lanes) + self._config.read_threads
        cache = _cache(self._dataset, self._config, capacity, self._collate.columns)
        try:
            planned: deque[_Planned] = deque()
            while True:
                while len(planned) <= self._config.read_threads:
                    planned.append(self._plan_batch(cache, position + len(planned) * self._per_lane))
                batch = planned.popleft()
                position += self._per_lane
                first_example = batch.first * self._order.lanes
                lane_B = np.repeat(np.asarray(self._lanes), self._per_lane)
                within_B = np.tile(np.arange(self._per_lane), len(self._lanes))
                draws = Draws(self._order.seed, first_example + lane_B * self._per_lane + within_B)
                yield self._collate(batch.rows(self._dataset.schema.timestamps), draws, first_example)
        finally:
            cache.close()

    def _plan_batch(self, cache: RowGroupCache, position: int) -> _Planned:
        rows = [self._order.lane_rows(lane, position, self._per_lane) for lane in self._lanes]
        group_B, row_B = self._order.locate(np.concatenate(rows))
        return _plan(cache, position, group_B, row_B)


class UserBatches:
    """One pass over the users, in file order: every iteration starts again, and has len() batches on every rank.

    A rank reads users [rank*N/R, (rank+1)*N/R). Every rank gets the same number of batches, filled up with rows that
    do not exist (group -1). global_batch_size: users a step over all ranks. Raises ConfigError if the world size does
    not divide it.
    """

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
        if global_batch_size % world_size:
            raise ConfigError(
                f"evaluation.global_batch_size={global_batch_size} is not divisible by the world size {world_size}; "
                f"set it to a multiple of {world_size}"
            )
        self._dataset, self._config, self._collate, self._columns = dataset, config, collate, columns
        self._size = global_batch_size // world_size
        bounds = [r * dataset.rows // world_size for r in range(world_size + 1)]
        self._rows = bounds[rank], bounds[rank + 1]
        self._batches = max(-(-(stop - start) // self._size) for start, stop in pairwise(bounds))
        self._counts = Counts()

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        self._counts = Counts()
        cache = _cache(self._dataset, self._config, 1, self._columns)
        starts = np.concatenate([[0], np.cumsum(self._dataset.row_counts)])
        try:
            planned: deque[_Planned] = deque()
            for number in range(self._batches):
                while len(planned) <= self._config.read_threads and number + len(planned) < self._batches:
                    planned.append(self._plan_batch(cache, starts, number + len(planned)))
                batch, counts = self._collate(planned.popleft().rows(self._dataset.schema.timestamps))
                self._counts += counts
                if counts.without_target:
                    log_once(log, f"{self._dataset.path}: some users have no event before the target; not evaluated")
                yield batch
        finally:
            cache.close()

    def counters(self) -> dict[str, int]:
        """Of this rank, in the latest iteration: users not evaluated, tokens older than the window, bad rows
        emptied.
        """
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": self._counts.truncated_tokens,
            "users_without_history": self._counts.without_target,
        }

    def _plan_batch(self, cache: RowGroupCache, starts: np.ndarray, number: int) -> _Planned:
        first, stop = self._rows
        rows = first + number * self._size + np.arange(self._size)
        real = rows < stop
        group_B = np.full(self._size, -1, dtype=np.int64)
        group_B[real] = np.searchsorted(starts, rows[real], side="right") - 1
        return _plan(cache, number, group_B, np.where(real, rows - starts[group_B], 0))


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

"""Batches for one rank: TrainLoader is endless and can resume, EvaluationBatches goes over the users once.

Row groups are decoded ahead by a pool of threads; one more thread collates training batches into a bounded queue.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np

from gr.batch import EvaluationBatch, SequenceBatch
from gr.config.tree import DataConfig
from gr.data.collate import Counts, Rows, collate_evaluation, collate_train
from gr.data.dataset import Dataset, Histories
from gr.data.order import TrainingOrder, owned_lanes
from gr.data.prefetch import Ahead, RowGroupCache
from gr.errors import CheckpointError, ConfigError
from gr.logging import get_logger, log_once

log = get_logger(__name__)


def _cache(dataset: Dataset, config: DataConfig, capacity: int) -> RowGroupCache[Histories]:
    read = partial(dataset.read_row_group, columns=None, on_bad_row=config.on_bad_row)
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
    used, index_B = np.unique(group_B, return_inverse=True)
    groups = [cache.request(group) for group in used.tolist() if group >= 0]
    if len(groups) < len(used):  # -1 comes first: rows that only fill up the batch
        index_B = index_B - 1
    return _Planned(first, groups, index_B, row_B)


class TrainLoader:
    """Endless iterator of this rank's part of each global batch, in the order of docs/design/data-order.md.

    global_batch_size: examples a step over all ranks. Counters and state_dict() speak of batches handed out, not of
    those collated ahead. Errors in the reading threads are raised by next(). Raises ConfigError when the world size
    does not divide data.lanes, data.lanes does not divide the batch, or there are fewer rows than lanes.
    """

    def __init__(
        self, dataset: Dataset, config: DataConfig, *, seed: int, global_batch_size: int, rank: int, world_size: int
    ) -> None:
        if global_batch_size % config.lanes:
            raise ConfigError(
                f"trainer.global_batch_size={global_batch_size} is not divisible by data.lanes={config.lanes}; set one "
                "to a multiple or divisor of the other"
            )
        self._dataset, self._config = dataset, config
        self._lanes = owned_lanes(config.lanes, rank, world_size)
        self._per_lane = global_batch_size // config.lanes
        self._order = TrainingOrder(dataset.row_counts, lanes=config.lanes, seed=seed, shuffle=config.shuffle)
        self._position = 0
        self._counts = Counts()
        self._ahead: Ahead[tuple[SequenceBatch, Counts]] | None = None
        self._closed = False
        self.wait_seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> SequenceBatch:
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
        window, and examples without a target."""
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": self._counts.truncated_tokens,
            "examples_without_target": self._counts.without_target,
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

    def _batches(self, position: int) -> Iterator[tuple[SequenceBatch, Counts]]:
        cache = _cache(self._dataset, self._config, 2 * len(self._lanes) + self._config.read_threads)
        try:
            planned: deque[_Planned] = deque()
            while True:
                while len(planned) <= self._config.read_threads:
                    planned.append(self._plan_batch(cache, position + len(planned) * self._per_lane))
                batch = planned.popleft()
                position += self._per_lane
                yield collate_train(
                    batch.rows(self._dataset.schema.timestamps),
                    max_length=self._config.max_length,
                    holdout=self._config.train_holdout,
                    first_example=batch.first * self._order.lanes,
                )
        finally:
            cache.close()

    def _plan_batch(self, cache: RowGroupCache, position: int) -> _Planned:
        rows = [self._order.lane_rows(lane, position, self._per_lane) for lane in self._lanes]
        group_B, row_B = self._order.locate(np.concatenate(rows))
        return _plan(cache, position, group_B, row_B)


class EvaluationBatches:
    """One pass over the users: every iteration starts again, and has len() batches on every rank. See
    evaluation_batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        target_from_end: Literal[1, 2],
        rank_batch_size: int,
        filter_seen: Literal["window", "all", "none"],
        rows: tuple[int, int],
        batches: int,
    ) -> None:
        self._dataset, self._config = dataset, config
        self._target_from_end, self._filter_seen = target_from_end, filter_seen
        self._size, self._rows, self._batches = rank_batch_size, rows, batches
        self._counts = Counts()

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[EvaluationBatch]:
        self._counts = Counts()
        cache = _cache(self._dataset, self._config, 1)
        starts = np.concatenate([[0], np.cumsum(self._dataset.row_counts)])
        try:
            planned: deque[_Planned] = deque()
            for number in range(self._batches):
                while len(planned) <= self._config.read_threads and number + len(planned) < self._batches:
                    planned.append(self._plan_batch(cache, starts, number + len(planned)))
                batch, counts = collate_evaluation(
                    planned.popleft().rows(self._dataset.schema.timestamps),
                    max_length=self._config.max_length,
                    target_from_end=self._target_from_end,
                    filter_seen=self._filter_seen,
                )
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
    config: DataConfig,
    *,
    target_from_end: Literal[1, 2],
    global_batch_size: int,
    filter_seen: Literal["window", "all", "none"],
    rank: int = 0,
    world_size: int = 1,
) -> EvaluationBatches:
    """Evaluation batches of this rank: users [rank*N/R, (rank+1)*N/R) in file order.

    target_from_end: 1 ranks the newest event (test), 2 the one before (validation). global_batch_size: users a step
    over all ranks. Every rank gets the same number of batches, filled up with rows that are not valid.
    Raises ConfigError if the world size does not divide the batch size.
    """
    if global_batch_size % world_size:
        raise ConfigError(
            f"evaluation.global_batch_size={global_batch_size} is not divisible by the world size {world_size}; set it "
            f"to a multiple of {world_size}"
        )
    size = global_batch_size // world_size
    bounds = [r * dataset.rows // world_size for r in range(world_size + 1)]
    batches = max(-(-(stop - start) // size) for start, stop in pairwise(bounds))
    return EvaluationBatches(
        dataset,
        config,
        target_from_end=target_from_end,
        rank_batch_size=size,
        filter_seen=filter_seen,
        rows=(bounds[rank], bounds[rank + 1]),
        batches=batches,
    )

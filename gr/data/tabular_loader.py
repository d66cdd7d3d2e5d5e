"""Batches of a tabular folder for one rank, in one pass: the same order at any world size, and resumable.

Row groups are decoded ahead by a pool of threads; one more thread collates batches into a bounded queue.

B rows of a batch on this rank, H ids of a row.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import TabularBatch
from gr.data.order import TrainingOrder
from gr.data.prefetch import Ahead, RowGroupCache
from gr.data.tabular import TabularDataset, TabularRows
from gr.errors import CheckpointError, ConfigError
from gr.logging import get_logger, log_once

log = get_logger(__name__)
_READ_THREADS = 2
_PREFETCH = 2  # batches collated ahead


class TabularLoader:
    """Iterator of this rank's part of each global batch: rows [b*G, (b+1)*G) of the pass, in file order, of which rank
    r takes the r-th of world_size equal slices.

    global_batch_size: G, rows a step over all ranks. start_step: the batch to begin with. shuffle_seed: instead of file
    order, row groups in a random order and the rows of each in a random order; the same at any world size. rows: part
    of the data to go over. drop_last: leave out the last G' < G rows; otherwise they are shared as evenly as ranks
    allow, which may leave a rank with a batch of no rows. Errors in the reading threads are raised by next().
    Raises ConfigError if the world size does not divide G, there is no whole batch, or `rows` or start_step is outside
    the data.
    """

    def __init__(
        self,
        dataset: TabularDataset,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        shuffle_seed: int | None = None,
        rows: slice | None = None,
        drop_last: bool = True,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not divisible by the world size {world_size}; set it to a "
                f"multiple of {world_size}"
            )
        self._dataset, self._size, self._rank, self._world_size = dataset, global_batch_size, rank, world_size
        self._first, self._stop_row = _bounds(rows, dataset.rows)
        self._shuffle_seed = shuffle_seed
        self._spans = _spans(dataset.row_counts, self._first, self._stop_row)
        self._order = TrainingOrder(
            [stop - start for _, start, stop in self._spans],
            lanes=1,
            seed=0 if shuffle_seed is None else shuffle_seed,
            shuffle=shuffle_seed is not None,
        )
        total = self._order.rows
        self._batches = total // global_batch_size if drop_last else -(-total // global_batch_size)
        self._dropped = total % global_batch_size if drop_last else 0
        if not self._batches:
            raise ConfigError(
                f"{dataset.path}: {total} rows do not fill one batch of {global_batch_size}; set a smaller batch size, "
                "or drop_last=False"
            )
        self._seek(start_step)
        self._ahead: Ahead[TabularBatch] | None = None
        self._closed = False
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        """Batches of the whole pass, on every rank."""
        return self._batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TabularBatch:
        """The next batch. Time spent here waiting for it is added to wait_seconds."""
        failed = self._ahead is not None and self._ahead.error is not None
        if not failed and (self._closed or self._step == self._batches):
            self._tell()
            self._stop()
            raise StopIteration
        if self._ahead is None:
            self._ahead = Ahead(self._batches_from(self._step), _PREFETCH)
        waited = self._ahead.wait_seconds
        batch = self._ahead.take()
        self.wait_seconds += self._ahead.wait_seconds - waited
        self._step += 1
        return batch

    def counters(self) -> dict[str, int]:
        """Rows of the pass that no rank gives: those after the last whole batch."""
        return {"dropped_examples": self._dropped}

    def state_dict(self) -> dict[str, int | None]:
        """step: batches handed out since the beginning of the pass. The rest identifies the pass; the same on all
        ranks.
        """
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch handed out before the state was saved, on any world size.

        Raises CheckpointError if data, batch size, shuffle_seed or rows differ: they are another pass.
        """
        for name, mine in self._identity().items():
            if name not in state or state[name] != mine:
                raise CheckpointError(
                    f"the checkpoint's pass over the data has {name}={state.get(name)}, this run has {name}={mine}; "
                    "resume with the same data folder, rows, batch size and seed, or start a new run"
                )
        self._stop()
        self._ahead = None
        self._seek(int(state["step"]))

    def close(self) -> None:
        """Stop the threads. Safe to call twice; next() then raises StopIteration."""
        self._closed = True
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _seek(self, step: int) -> None:
        if not 0 <= step <= self._batches:
            raise ConfigError(f"step {step} is outside the pass; it has {self._batches} batches of {self._size} rows")
        self._step = step

    def _identity(self) -> dict[str, int | None]:
        layout = np.asarray(self._dataset.row_counts, dtype=np.int64).tobytes()
        return {
            "first_row": self._first,
            "stop_row": self._stop_row,
            "global_batch_size": self._size,
            "shuffle_seed": self._shuffle_seed,
            "row_groups": zlib.crc32(layout),
            "schema": zlib.crc32(self._dataset.schema.model_dump_json().encode()),
        }

    def _tell(self) -> None:
        if self._dropped:
            log_once(
                log,
                f"{self._dataset.path}: the last {self._dropped} rows do not fill a batch of {self._size}: left out",
            )

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def _batches_from(self, step: int) -> Iterator[TabularBatch]:
        cache = RowGroupCache(self._dataset.read_row_group, threads=_READ_THREADS, capacity=2)
        try:
            planned: deque[tuple[int, list[Future[TabularRows]], np.ndarray, np.ndarray]] = deque()
            for number in range(step, self._batches):
                while len(planned) <= _READ_THREADS and number + len(planned) < self._batches:
                    planned.append(self._plan(number + len(planned), cache))
                first, futures, group_B, row_B = planned.popleft()
                yield self._collate(first, [future.result() for future in futures], group_B, row_B)
        finally:
            cache.close()

    def _plan(
        self, step: int, cache: RowGroupCache[TabularRows]
    ) -> "tuple[int, list[Future[TabularRows]], np.ndarray, np.ndarray]":
        """First row of the global batch; its row groups, being decoded; which of them and which row there, [B]."""
        first = step * self._size
        size = min(self._size, self._order.rows - first)
        start, stop = (first + r * size // self._world_size for r in (self._rank, self._rank + 1))
        span_B, row_B = self._order.locate(self._order.lane_rows(0, start, stop - start))
        used, index_B = np.unique(span_B, return_inverse=True)
        futures = []
        for span in used.tolist():
            group, begin, _ = self._spans[span]
            futures.append(cache.request(group))
            row_B = row_B + np.where(span_B == span, begin, 0)
        return first, futures, index_B, row_B

    def _collate(self, first: int, groups: list[TabularRows], group_B: np.ndarray, row_B: np.ndarray) -> TabularBatch:
        schema = self._dataset.schema
        size = len(row_B)
        labels_B = np.empty(size, dtype=np.float32)
        dense_BN = np.empty((size, len(schema.dense)), dtype=np.float32)
        hots = [column.hots for column in schema.sparse]
        ids_BH = np.empty((size, sum(hots)), dtype=np.int64)
        for index, group in enumerate(groups):
            chosen, rows = group_B == index, row_B[group_B == index]
            labels_B[chosen], dense_BN[chosen] = group.labels_B[rows], group.dense_BN[rows]
            ids_BH[chosen] = group.ids_BH[rows]
        ends = list(accumulate(hots))
        values = [ids_BH[:, end - width : end].reshape(-1) for end, width in zip(ends, hots, strict=True)]
        return TabularBatch(
            dense_BN=torch.from_numpy(dense_BN),
            sparse=KeyedJaggedTensor(
                keys=[column.name for column in schema.sparse],
                values=torch.from_numpy(np.concatenate(values)),
                lengths=torch.from_numpy(np.repeat(np.asarray(hots, dtype=np.int64), size)),
                stride=size,
            ),
            labels_B=torch.from_numpy(labels_B),
            first_example=first,
        )


def _bounds(rows: slice | None, total: int) -> tuple[int, int]:
    first, stop = (0, total) if rows is None else (rows.start or 0, total if rows.stop is None else rows.stop)
    if (rows is not None and rows.step not in (None, 1)) or not 0 <= first < stop <= total:
        raise ConfigError(
            f"rows {rows} are no part of the {total} rows of the data; give slice(start, stop) within them"
        )
    return first, stop


def _spans(row_counts: list[int], first: int, stop: int) -> list[tuple[int, int, int]]:
    """(row group, first row, stop row within it) of the row groups that hold rows first to stop."""
    starts = [0, *accumulate(row_counts)]
    return [
        (group, max(first - start, 0), min(stop - start, count))
        for group, (start, count) in enumerate(zip(starts, row_counts, strict=False))
        if start < stop and start + count > first
    ]

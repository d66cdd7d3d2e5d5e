"""ResumableLoader: this rank's training batches, decoded and collated ahead, from any position in their order.

A BatchSource says which rows a batch has and how decoded rows become a batch: history_batches.py, time_windows.py and
tabular_pass.py have one each to train on, history_batches.py one to evaluate on. B examples of a batch on this rank.
"""

import time
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from itertools import count, pairwise
from typing import Any, Generic, Self, TypeVar

import numpy as np
from pydantic import BaseModel

from gr.data.collate import Counts
from gr.data.prefetch import Ahead, RowGroupCache
from gr.errors import CheckpointError, ConfigError, GRError

Group = TypeVar("Group")
Batch = TypeVar("Batch")
Places = tuple[np.ndarray, np.ndarray]  # of each example: its row group (-1: no row) and the row there, int64 [B] each


class BatchSource(ABC, Generic[Group, Batch]):
    """The batches of one rank. Each has a cursor, an integer that starts at 0 and grows by `stride` with every batch.

    stop: the cursor after the last batch, None where there is no last one. read_threads: threads that decode row
    groups, and the number of batches planned ahead. capacity: decoded row groups that stay for later batches.
    """

    stride: int = 1
    stop: int | None = None
    read_threads: int
    capacity: int

    @abstractmethod
    def read(self, row_group: int) -> Group:
        """Decodes and checks one row group, in a thread of the pool."""

    @abstractmethod
    def rows(self, cursor: int) -> Places:
        """The places of the examples of a batch."""

    @abstractmethod
    def collate(self, cursor: int, groups: Sequence[Group], places: Places) -> tuple[Batch, Counts]:
        """The batch at `cursor`. groups: its row groups, decoded. places: those of rows(), with indexes of `groups`."""

    def __len__(self) -> int:
        """Batches of the whole pass, on every rank. Raises TypeError where the source is endless."""
        if self.stop is None:
            raise TypeError(f"{type(self).__name__} is endless")
        return self.stop // self.stride

    def batches(self, start: int, stop: int | None) -> Generator[tuple[Batch, Counts], None, None]:
        """The batches from cursor `start` to before `stop`, while the row groups of the next ones are decoded."""
        cache = RowGroupCache(self.read, threads=self.read_threads, capacity=self.capacity)
        planned: deque[tuple[int, list[Future[Group]], Places]] = deque()
        try:
            for cursor in count(start, self.stride) if stop is None else range(start, stop, self.stride):
                group_B, row_B = self.rows(cursor)
                groups, index_B = cache.request(group_B)
                planned.append((cursor, groups, (index_B, row_B)))
                if len(planned) > self.read_threads:
                    yield self._collated(*planned.popleft())
            while planned:
                yield self._collated(*planned.popleft())
        finally:
            cache.close()

    def _collated(self, cursor: int, groups: list[Future[Group]], places: Places) -> tuple[Batch, Counts]:
        return self.collate(cursor, [group.result() for group in groups], places)


class ResumableSource(BatchSource[Group, Batch]):
    """A BatchSource in an order that a checkpoint can name.

    cursor_name: key of the cursor in a loader's state. identity: what else determines the order, the same on all
    ranks; a checkpoint with another value is refused. order_name, identity_keys: how that message calls the order and
    the settings that determine it. prefetch: batches collated ahead.
    """

    cursor_name: str = "step"
    identity: dict[str, int | None]
    order_name: str
    identity_keys: str
    prefetch: int

    @abstractmethod
    def steps(self, epochs: int) -> int:
        """Batches in which every example is given at least `epochs` times."""

    @abstractmethod
    def counters(self, counts: Counts) -> dict[str, int]:
        """The counters of this rank, given the sum of the counts of all batches handed out."""

    def log(self, counts: Counts) -> None:
        """Logs, once, that a batch leaves something out."""


class ResumableLoader(Generic[Batch]):
    """Iterator of a source's batches; a context manager, as it has threads to stop.

    Counters and state_dict() describe the batches handed out, not those collated ahead. An error in a thread is raised
    by next(), and again at every later call. wait_seconds: time that next() has waited for batches.
    """

    def __init__(self, source: ResumableSource[Any, Batch], *, start: int = 0) -> None:
        """start: cursor of the first batch. Raises ConfigError where it lies outside the pass."""
        self.source = source
        self.wait_seconds = 0.0
        self._counts = Counts()
        self._ahead: Ahead[tuple[Batch, Counts]] | None = None
        self._closed = False
        self._seek(start, ConfigError)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            if self._closed:
                raise StopIteration
            self._ahead = Ahead(self.source.batches(self._cursor, self.source.stop), self.source.prefetch)
        started = time.perf_counter()
        batch, counts = next(self._ahead)
        self.wait_seconds += time.perf_counter() - started
        self._cursor += self.source.stride
        self._counts += counts
        self.source.log(counts)
        return batch

    def steps(self, epochs: int) -> int:
        """Batches of so many epochs."""
        return self.source.steps(epochs)

    def counters(self) -> dict[str, int]:
        """The source's counters over the batches handed out since construction."""
        return self.source.counters(self._counts)

    def state_dict(self) -> dict[str, int | None]:
        """The cursor after the last batch handed out, and the identity of the order; the same on all ranks."""
        return {self.source.cursor_name: self._cursor, **self.source.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch handed out before the state was saved, on any world size the source allows.

        Raises CheckpointError where the state is of another order, or has no cursor.
        """
        source = self.source
        for name, own in source.identity.items():
            if name not in state or state[name] != own:
                raise CheckpointError(
                    f"the checkpoint's {source.order_name} has {name}={state.get(name)}, this run has {name}={own}; "
                    f"resume with the same {source.identity_keys}, or start a new run"
                )
        cursor = state.get(source.cursor_name)
        if type(cursor) is not int:
            raise CheckpointError(
                f"the checkpoint's {source.order_name} has {source.cursor_name}={cursor}, no place to continue from; "
                "remove the checkpoint to use the one before"
            )
        self._seek(cursor, CheckpointError)
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def close(self) -> None:
        """Stops the threads; next() then raises StopIteration. Safe to call twice."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _seek(self, cursor: int, error: type[GRError]) -> None:
        stop = self.source.stop
        if cursor < 0 or (stop is not None and cursor > stop):
            raise error(f"{self.source.cursor_name} {cursor} is outside the pass; it has {stop} batches")
        self._cursor = cursor


def checksums(row_counts: Sequence[int], schema: BaseModel) -> dict[str, int | None]:
    """The part of an identity that tells one data folder from another: CRC-32 of its row groups and of its schema."""
    layout = np.asarray(row_counts, dtype=np.int64).tobytes()
    return {"row_groups": zlib.crc32(layout), "schema": zlib.crc32(schema.model_dump_json().encode())}


def dealt(rows: int, ranks: int, size: int) -> tuple[list[int], int]:
    """Rows in file order, dealt to ranks: rank r has [bounds[r], bounds[r+1]); and the batches of the largest share.

    size: rows of a rank's batch.
    """
    bounds = [rank * rows // ranks for rank in range(ranks + 1)]
    return bounds, max(-(-(stop - start) // size) for start, stop in pairwise(bounds))


def rank_batch_size(key: str, global_batch_size: int, world_size: int) -> int:
    """Examples of a global batch on each rank. Raises ConfigError, naming `key`, unless the ranks have equal shares."""
    if global_batch_size < 1 or global_batch_size % world_size:
        raise ConfigError(
            f"{key}={global_batch_size} is not divisible by the world size {world_size}; set it to a multiple of "
            f"{world_size}"
        )
    return global_batch_size // world_size

"""One pass over histories in the order of time, window by window: what a model would have seen, had it trained live.

A window is a part of the time; its examples are the users with an event in it, in file order, each with the history up
to the window's end, of which the events in the window are predicted. So every event is trained on once. Batches do not
cross windows, and are the same at any world size. Memory: row groups in use, and a count for each window and row group.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from gr.batch import RankingBatch
from gr.config.ranking import RankingDataConfig
from gr.data.collate import Counts, Rows
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset, Histories
from gr.data.prefetch import Ahead, RowGroupCache
from gr.errors import CheckpointError, ConfigError, DataError
from gr.logging import get_logger, log_once

log = get_logger(__name__)


@dataclass(frozen=True)
class Windows:
    """bounds: int64 [W + 1], seconds; window w has the events of bounds[w] <= t < bounds[w + 1]. users_WG: how many
    users of each row group have an event in it.
    """

    bounds: np.ndarray
    users_WG: np.ndarray

    @classmethod
    def read(cls, dataset: Dataset, windows: int, on_bad_row: Any) -> Self:
        """Reads every timestamp twice. Raises DataError where there are none."""
        groups = range(len(dataset.row_groups))
        read = partial(dataset.read_row_group, columns=["timestamps"], on_bad_row=on_bad_row)
        first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        for group in tqdm(groups, desc="times", unit="row group", disable=None):
            times = read(group).columns["timestamps"]
            first, last = min(first, times.min(initial=first)), max(last, times.max(initial=last))
        if first > last:
            raise DataError(f"{dataset.path}: has no events to stream")
        bounds = first + (last + 1 - first) * np.arange(windows + 1) // windows
        counts = [
            (events_by_window(read(group), bounds) > 0).sum(axis=0)
            for group in tqdm(groups, desc="windows", unit="row group", disable=None)
        ]
        return cls(bounds, np.stack(counts, axis=1))


def events_by_window(histories: Histories, bounds: np.ndarray) -> np.ndarray:
    """How many events each user has in each window, int64 [B, W]. Times ascend within a user."""
    users, windows = len(histories.lengths_B), len(bounds) - 1
    window_T = np.searchsorted(bounds, histories.columns["timestamps"], side="right") - 1
    row_T = np.repeat(np.arange(users), histories.lengths_B)
    return np.bincount(row_T * windows + window_T, minlength=users * windows).reshape(users, windows)


@dataclass(frozen=True)
class _Group:
    """A decoded row group, and what events_by_window says of it."""

    histories: Histories
    events_BW: np.ndarray


@dataclass(frozen=True)
class _Planned:
    """A batch whose row groups are being decoded: example b is the nth_B[b]-th active user of groups[group_B[b]]."""

    window: int
    groups: "list[Future[_Group]]"
    group_B: np.ndarray
    nth_B: np.ndarray


class StreamLoader:
    """Iterator of this rank's part of each batch of the pass.

    global_batch_size: G, examples a step over all ranks; the last batch of a window has the rest. Rank r takes the
    r-th of world_size equal slices of the places 0..G-1. Raises ConfigError if the world size does not divide G.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: RankingDataConfig,
        collate: RankingCollate,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        assert config.stream is not None
        if global_batch_size % world_size:
            raise ConfigError(
                f"trainer.global_batch_size={global_batch_size} is not divisible by the world size {world_size}; set "
                f"it to a multiple of {world_size}"
            )
        self._dataset, self._config, self._collate = dataset, config, collate
        self._size, self._share = global_batch_size, global_batch_size // world_size
        self._offset = rank * self._share
        self._windows = Windows.read(dataset, config.stream.windows, config.on_bad_row)
        examples_W = self._windows.users_WG.sum(axis=1)
        self._first_step = np.concatenate([[0], np.cumsum(-(-examples_W // global_batch_size))])
        self._first_example = np.concatenate([[0], np.cumsum(examples_W)])
        self._step = 0
        self._counts = Counts()
        self._ahead: Ahead[tuple[RankingBatch, Counts]] | None = None
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        """Batches of the whole pass."""
        return int(self._first_step[-1])

    def starting_window(self, step: int) -> int | None:
        """The window whose first batch is the step-th, if one begins there."""
        window = int(np.searchsorted(self._first_step, step, side="right")) - 1
        return window if step < len(self) and self._first_step[window] == step else None

    def window(self, window: int) -> Iterator[RankingBatch]:
        """The batches of one window, without moving the loader."""
        for batch, _ in self._batches(int(self._first_step[window]), int(self._first_step[window + 1])):
            yield batch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RankingBatch:
        """The next batch. Time spent here waiting for it is added to wait_seconds."""
        if self._step == len(self):
            raise StopIteration
        if self._ahead is None:
            self._ahead = Ahead(self._batches(self._step, len(self)), self._config.prefetch)
        waited = self._ahead.wait_seconds
        batch, counts = self._ahead.take()
        self.wait_seconds += self._ahead.wait_seconds - waited
        self._step += 1
        self._counts += counts
        if counts.unpredicted:
            log_once(
                log,
                f"some users have more events in a window than data.max_length={self._config.max_length}: their oldest "
                "are not trained on",
            )
        return batch

    def counters(self) -> dict[str, int]:
        """Of this rank, since construction: distinct bad rows emptied, events older than data.max_length, and those of
        them that lie in the window and so were never trained on.
        """
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": self._counts.truncated_tokens,
            "unpredicted": self._counts.unpredicted,
        }

    def state_dict(self) -> dict[str, int]:
        """step: batches handed out. The rest identifies the pass; the same on all ranks."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch handed out before the state was saved, on any world size.

        Raises CheckpointError if the batch size, windows or data differ: they are another pass.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise CheckpointError(
                    f"the checkpoint's stream has {name}={state.get(name)}, this run has {name}={mine}; resume with "
                    "the same data folder, trainer.global_batch_size and data.stream, or start a new run"
                )
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stop the threads. Safe to call twice."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _identity(self) -> dict[str, int]:
        return {
            "global_batch_size": self._size,
            "windows": len(self._windows.bounds) - 1,
            "users": zlib.crc32(self._windows.users_WG.astype(np.int64).tobytes()),
            "schema": zlib.crc32(self._dataset.schema.model_dump_json().encode()),
        }

    def _batches(self, start: int, stop: int) -> Iterator[tuple[RankingBatch, Counts]]:
        cache = RowGroupCache(self._read, threads=self._config.read_threads, capacity=1 + self._config.read_threads)
        try:
            planned: deque[_Planned] = deque()
            for step in range(start, stop):
                while len(planned) <= self._config.read_threads and step + len(planned) < stop:
                    planned.append(self._plan(cache, step + len(planned)))
                yield self._collated(planned.popleft(), step)
        finally:
            cache.close()

    def _read(self, group: int) -> _Group:
        histories = self._dataset.read_row_group(group, self._collate.columns, self._config.on_bad_row)
        return _Group(histories, events_by_window(histories, self._windows.bounds))

    def _plan(self, cache: RowGroupCache[_Group], step: int) -> _Planned:
        window = int(np.searchsorted(self._first_step, step, side="right")) - 1
        ends_G = np.cumsum(self._windows.users_WG[window])
        place_B = (step - self._first_step[window]) * self._size + self._offset + np.arange(self._share)
        real_B = place_B < ends_G[-1]
        group_B = np.where(real_B, np.searchsorted(ends_G, place_B, side="right"), -1)
        starts_G = ends_G - self._windows.users_WG[window]
        return _Planned(window, *cache.request_all(group_B), np.where(real_B, place_B - starts_G[group_B], 0))

    def _collated(self, planned: _Planned, step: int) -> tuple[RankingBatch, Counts]:
        window = planned.window
        groups = [future.result() for future in planned.groups]
        row_B, stop_B, scored_B = (np.zeros(self._share, dtype=np.int64) for _ in range(3))
        for index, group in enumerate(groups):
            chosen = planned.group_B == index
            rows = np.flatnonzero(group.events_BW[:, window])[planned.nth_B[chosen]]
            row_B[chosen] = rows
            stop_B[chosen] = group.events_BW[rows, : window + 1].sum(axis=1)
            scored_B[chosen] = group.events_BW[rows, window]
        rows_of_groups = Rows([group.histories for group in groups], planned.group_B, row_B, timestamps=True)
        first = self._first_example[window] + (step - self._first_step[window]) * self._size
        return self._collate.scored(rows_of_groups, stop_B, scored_B, int(first))

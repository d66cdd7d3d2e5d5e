"""One pass over histories in the order of time, window by window, as a model that trains live would see them.

A window is a part of the time; its examples are the users with an event in it, in file order, each with the history up
to the window's end, of which the events in the window are predicted. So every event is trained on once. Batches do not
cross windows, and are the same at any world size. Memory: row groups in use, and a count for each window and row group.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from tqdm import tqdm

from gr.batch import RankingBatch
from gr.config.ranking import RankingDataConfig
from gr.data.collate import Counts, Rows
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset, Histories
from gr.data.loader import Places, ResumableSource, checksums, rank_batch_size
from gr.errors import DataError
from gr.logging import get_logger, log_once

log = get_logger(__name__)


def read_windows(dataset: Dataset, windows: int, on_bad_row: Literal["fail", "skip"]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the windows, seconds, int64 [W + 1], and how many users of each row group have an event in each [W, G].

    Window w has the events of bounds[w] <= t < bounds[w + 1]. Reads every timestamp twice. Raises DataError where there
    are none.
    """
    groups = range(len(dataset.row_groups))
    read = partial(dataset.read_row_group, columns=["timestamps"], on_bad_row=on_bad_row)
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for group in tqdm(groups, desc="times", unit="row group", disable=None):
        times = read(group).columns["timestamps"]
        first, last = min(first, times.min(initial=first)), max(last, times.max(initial=last))
    if first > last:
        raise DataError(f"{dataset.path}: has no events to stream")
    bounds = first + (last + 1 - first) * np.arange(windows + 1) // windows
    users_GW = [
        (events_by_window(read(group), bounds) > 0).sum(axis=0)
        for group in tqdm(groups, desc="windows", unit="row group", disable=None)
    ]
    return bounds, np.stack(users_GW, axis=1)


def events_by_window(histories: Histories, bounds: np.ndarray) -> np.ndarray:
    """The number of events of each user in each window, int64 [B, W]. Times ascend within a user."""
    users, windows = len(histories.lengths_B), len(bounds) - 1
    window_T = np.searchsorted(bounds, histories.columns["timestamps"], side="right") - 1
    row_T = np.repeat(np.arange(users), histories.lengths_B)
    return np.bincount(row_T * windows + window_T, minlength=users * windows).reshape(users, windows)


@dataclass(frozen=True)
class _Group:
    """A decoded row group, and the number of events of each of its users in each window."""

    histories: Histories
    events_BW: np.ndarray


class WindowPass(ResumableSource[_Group, RankingBatch]):
    """One pass over the windows. The cursor is the step: batches before this one, of which none crosses a window.

    global_batch_size: G, examples a step over all ranks; the last batch of a window has the rest. Rank r takes the
    r-th of world_size equal slices of the places 0..G-1.
    """

    order_name = "stream"
    identity_keys = "data folder, trainer.global_batch_size and data.stream"

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
        """Raises ConfigError if the world size does not divide the batch, DataError where there are no events."""
        assert config.stream is not None
        self._share = rank_batch_size("trainer.global_batch_size", global_batch_size, world_size)
        self._dataset, self._config, self._collate = dataset, config, collate
        self._size, self._offset = global_batch_size, rank * self._share
        self._bounds, self._users_WG = read_windows(dataset, config.stream.windows, config.on_bad_row)
        examples_W = self._users_WG.sum(axis=1)
        self._first_step = np.concatenate([[0], np.cumsum(-(-examples_W // global_batch_size))])
        self._first_example = np.concatenate([[0], np.cumsum(examples_W)])
        self.stop = int(self._first_step[-1])
        self.read_threads, self.prefetch = config.read_threads, config.prefetch
        self.capacity = 1 + config.read_threads
        self.identity = {
            "global_batch_size": global_batch_size,
            "windows": config.stream.windows,
            "users": zlib.crc32(self._users_WG.astype(np.int64).tobytes()),
            "schema": checksums(dataset.row_counts, dataset.schema)["schema"],
        }

    def steps(self, epochs: int) -> int:
        return epochs * len(self)  # one pass, as the configuration has it

    def starting_window(self, step: int) -> int | None:
        """The window whose first batch is the step-th, if one begins there."""
        window = self._window_of(step)
        return window if step < len(self) and self._first_step[window] == step else None

    def window(self, window: int) -> Iterator[RankingBatch]:
        """The batches of one window, apart from those of a loader."""
        first, stop = self._first_step[window : window + 2].tolist()
        return (batch for batch, _ in self.batches(first, stop))

    def read(self, row_group: int) -> _Group:
        histories = self._dataset.read_row_group(row_group, self._collate.columns, self._config.on_bad_row)
        return _Group(histories, events_by_window(histories, self._bounds))

    def rows(self, cursor: int) -> Places:
        """A row is the place of a user among those of its row group that have an event in the window."""
        window = self._window_of(cursor)
        users_G = self._users_WG[window]
        stop_G = np.cumsum(users_G)
        place_B = (cursor - self._first_step[window]) * self._size + self._offset + np.arange(self._share)
        is_user_B = place_B < stop_G[-1]
        group_B = np.where(is_user_B, np.searchsorted(stop_G, place_B, side="right"), -1)
        return group_B, np.where(is_user_B, place_B - (stop_G - users_G)[group_B], 0)

    def collate(self, cursor: int, groups: Sequence[_Group], places: Places) -> tuple[RankingBatch, Counts]:
        (group_B, row_B), window = places, self._window_of(cursor)
        user_B, stop_B, scored_B = (np.zeros(self._share, dtype=np.int64) for _ in range(3))
        for index, group in enumerate(groups):
            chosen = group_B == index
            users = np.flatnonzero(group.events_BW[:, window])[row_B[chosen]]
            user_B[chosen] = users
            stop_B[chosen] = group.events_BW[users, : window + 1].sum(axis=1)
            scored_B[chosen] = group.events_BW[users, window]
        rows = Rows([group.histories for group in groups], group_B, user_B, timestamps=True)
        first_example = self._first_example[window] + (cursor - self._first_step[window]) * self._size
        return self._collate.scored(rows, stop_B, scored_B, int(first_example))

    def counters(self, counts: Counts) -> dict[str, int]:
        """Distinct bad rows emptied; events older than data.max_length; of these the events of the batch's own window,
        which were never trained on.
        """
        return {
            "bad_rows": self._dataset.bad_rows,
            "truncated_tokens": counts.truncated_tokens,
            "unpredicted": counts.unpredicted,
        }

    def log(self, counts: Counts) -> None:
        if counts.unpredicted:
            limit = f"data.max_length={self._config.max_length}"
            log_once(log, f"some users have more events in a window than {limit}: their oldest are not trained on")

    def _window_of(self, step: int) -> int:
        return int(np.searchsorted(self._first_step, step, side="right")) - 1

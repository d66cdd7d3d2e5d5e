"""Collation: rows of decoded row groups become batches, by index arithmetic on packed arrays, not a loop over examples.

B examples, T packed tokens. A window of an example is (start, length) in events from its oldest one. A place is the
index of an event in the history of its example.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import ITEM_FEATURE, EvaluationBatch, RetrievalBatch
from gr.config.histories import HistoryDataConfig, StochasticLength
from gr.data.dataset import Histories
from gr.data.stochastic_length import DROP, Draws, random_ends, stochastic_length


@dataclass(frozen=True)
class Rows:
    """Examples of one batch: group_B indexes `groups` (-1: no row, an empty history), row_B the row within it.

    timestamps: whether batches carry times.
    """

    groups: Sequence[Histories]
    group_B: np.ndarray
    row_B: np.ndarray
    timestamps: bool

    def lengths_B(self) -> np.ndarray:
        """Events of each example, int64 [B]."""
        return self._by_example(lambda group: group.offsets[1:], np.dtype(np.int64)) - self._first_B

    @cached_property
    def _first_B(self) -> np.ndarray:
        """The place of each example's oldest event in the packed columns of its row group, int64 [B]."""
        return self._by_example(lambda group: group.offsets, np.dtype(np.int64))

    def values(self, column: str, events: "Events") -> np.ndarray:
        """Packed values of an event column, [T]."""
        if events.kept_T is None:
            return self.gather(column, events.start_B, events.length_B)
        return self.at(column, events.length_B, events.kept_T)

    def gather(self, column: str, start_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """Packed values of an event column, [sum(length_B)]: the window of each example, copied as a block."""
        columns = [group.columns[column] for group in self.groups]
        first_B = self._first_B + start_B
        windows = zip(self.group_B.tolist(), first_B.tolist(), (first_B + length_B).tolist(), strict=True)
        return np.concatenate([np.empty(0, self._dtype(column)), *(columns[g][i:j] for g, i, j in windows if i < j)])

    def at(self, column: str, length_B: np.ndarray, place_T: np.ndarray) -> np.ndarray:
        """Packed values of an event column, [T]: length_B events of each example, at the places place_T."""
        offsets = _offsets(length_B)
        values = np.empty(offsets[-1], dtype=self._dtype(column))
        for index, group in enumerate(self.groups):
            chosen = np.flatnonzero(self.group_B == index)
            slots = ranges(offsets[chosen], length_B[chosen])
            first = np.repeat(group.offsets[self.row_B[chosen]], length_B[chosen])
            values[slots] = group.columns[column][first + place_T[slots]]
        return values

    def user_values(self, column: str) -> np.ndarray:
        """Values of a user column, [B]; 0 where there is no row."""
        return self._by_example(lambda group: group.columns[column], self._dtype(column))

    def _by_example(self, row_values: Callable[[Histories], np.ndarray], dtype: np.dtype) -> np.ndarray:
        values = np.zeros(len(self.row_B), dtype)
        for index, group in enumerate(self.groups):
            chosen = self.group_B == index
            values[chosen] = row_values(group)[self.row_B[chosen]]
        return values

    def _dtype(self, column: str) -> np.dtype:
        """float32 of numbers; int64 of ids, whatever they are in the row groups."""
        is_number = bool(self.groups) and self.groups[0].columns[column].dtype.kind == "f"
        return np.dtype(np.float32 if is_number else np.int64)


@dataclass(frozen=True)
class Events:
    """Events of each example: length_B of them, from place start_B on. kept_T: their places where they are not all of
    a window, [T]; None where they are.
    """

    start_B: np.ndarray
    length_B: np.ndarray
    kept_T: np.ndarray | None = None

    @cached_property
    def place_T(self) -> np.ndarray:
        """The place of each event, int64 [T]."""
        return ranges(self.start_B, self.length_B) if self.kept_T is None else self.kept_T

    def followers(self, last_B: np.ndarray) -> "Events":
        """The event that follows each event; last_B follows the last event of an example."""
        if self.kept_T is None:  # last_B is the place after the window
            return Events(self.start_B + 1, self.length_B)
        next_T = np.append(self.kept_T[1:], 0)[: len(self.kept_T)]
        nonempty_B = self.length_B > 0
        next_T[_offsets(self.length_B)[1:][nonempty_B] - 1] = last_B[nonempty_B]
        return Events(self.start_B, self.length_B, next_T)


@dataclass(frozen=True)
class Counts:
    """Tokens and examples that collation left out, and the tokens of its batches.

    truncated_tokens: inputs older than the window. without_target: empty examples. subsampled_tokens: inputs that
    stochastic length and event dropout left out. tokens: inputs of the batches. unpredicted: events to predict older
    than the window.
    """

    truncated_tokens: int = 0
    without_target: int = 0
    subsampled_tokens: int = 0
    tokens: int = 0
    unpredicted: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def collate_train(
    rows: Rows, draws: Draws, first_example: int, config: HistoryDataConfig
) -> tuple[RetrievalBatch, Counts]:
    """A batch for retrieval: inputs and next items of each example, without its newest config.train_holdout events.

    With usable = items[:n - holdout], or fewer where config.cut is uniform, the inputs are the newest max_length of
    usable[:-1], or those of them that stochastic length keeps. The target of an input is the input after it; the target
    of the last one is usable[-1]. An example with fewer than two usable events is empty.
    """
    batch, counts, _, _ = collate_positions(rows, draws, first_example, config)
    return batch, counts


def collate_positions(
    rows: Rows, draws: Draws, first_example: int, config: HistoryDataConfig
) -> tuple[RetrievalBatch, Counts, Events, np.ndarray]:
    """The results of collate_train, the events that are the targets, and the place of each example's last one [B]."""
    inputs_B = np.maximum(rows.lengths_B() - config.train_holdout - 1, 0)
    empty_examples = int((inputs_B < 1).sum())
    if config.cut == "uniform":
        inputs_B = random_ends(inputs_B, draws)
    inputs, dropped = chosen_events(rows, inputs_B, config, draws)
    targets = inputs.followers(inputs_B)
    items = rows.values("item_ids", inputs)
    batch = RetrievalBatch(
        features=item_ids(items, inputs.length_B),
        target_ids_T=torch.from_numpy(rows.values("item_ids", targets)),
        timestamps_T=times(rows, inputs),
        query_timestamps_T=times(rows, targets),
        first_example=first_example,
    )
    return batch, Counts(int(inputs.start_B.sum()), empty_examples, dropped, len(items)), targets, inputs_B


def chosen_events(rows: Rows, stop_B: np.ndarray, config: HistoryDataConfig, draws: Draws) -> tuple[Events, int]:
    """The newest config.max_length of the first stop_B events of each example, without those that stochastic length and
    event dropout leave out, and how many these are.
    """
    window_B = np.minimum(stop_B, config.max_length)
    window = Events(stop_B - window_B, window_B)
    if config.stochastic_length is None and not config.event_dropout:
        return window, 0
    place_T, example_T = window.place_T, np.repeat(np.arange(len(window_B)), window_B)
    keep_T = np.ones(len(place_T), dtype=bool)
    if config.stochastic_length is not None:
        keep_T = _subsequence(rows, window, config.stochastic_length, config.max_length, draws)
    if config.event_dropout:
        dropped_T = draws.uniform(DROP, draws.number_B[example_T], place_T) < config.event_dropout
        keep_T &= ~dropped_T | (place_T == (stop_B - 1)[example_T])
    length_B = np.bincount(example_T[keep_T], minlength=len(window_B))
    return Events(window.start_B, length_B, place_T[keep_T]), int((~keep_T).sum())


def _subsequence(rows: Rows, window: Events, config: StochasticLength, max_length: int, draws: Draws) -> np.ndarray:
    """The events of the windows that stochastic length keeps, bool [T]."""
    window_B = window.length_B
    time_T = rows.values("timestamps", window) if rows.timestamps else window.place_T
    newest_B = np.zeros(len(window_B), dtype=np.int64)
    newest_B[window_B > 0] = time_T[_offsets(window_B)[1:][window_B > 0] - 1]
    ages_T = np.repeat(newest_B, window_B) - time_T
    return stochastic_length(window_B, ages_T, config, max_length, draws)


def collate_evaluation(
    rows: Rows,
    *,
    max_length: int,
    target_from_end: int,
    filter_seen: Literal["window", "all", "none"],
    users: bool = False,
) -> tuple[EvaluationBatch, Counts]:
    """A batch for evaluation: the newest max_length events before the target, the target_from_end-th from the end.

    target_from_end=0 holds nothing out: all events are history, and no target is named.

    Examples without an event before the target are empty, not valid, with target 0. The seen_ids of an example are
    ascending, unique and without its target; they come from the window, from all events before the target, or there are
    none: on data with repeated targets filtering favours scorers that put seen items first (gr/prepare/oracle.py).
    """
    before_B = np.maximum(rows.lengths_B() - target_from_end, 0)
    valid_B = before_B > 0
    length_B = np.minimum(before_B, max_length)
    start_B = before_B - length_B
    targets = np.zeros(len(before_B), dtype=np.int64)
    if target_from_end:
        targets[valid_B] = rows.gather("item_ids", before_B, valid_B.astype(np.int64))
    items = rows.gather("item_ids", start_B, length_B)
    zeros_B = np.zeros_like(start_B)
    windows = {"window": (start_B, length_B), "all": (zeros_B, before_B), "none": (zeros_B, zeros_B)}
    seen_start_B, seen_B = windows[filter_seen]
    seen_ids, seen_offsets = _seen(rows.gather("item_ids", seen_start_B, seen_B), seen_B, targets)
    window = Events(start_B, length_B)
    next_T = np.minimum(window.place_T + 1, np.repeat(rows.lengths_B() - 1, length_B))
    batch = EvaluationBatch(
        features=item_ids(items, length_B),
        timestamps_T=times(rows, window),
        query_timestamps_T=times(rows, Events(start_B, length_B, next_T)),
        target_ids_B=torch.from_numpy(targets),
        valid_B=torch.from_numpy(valid_B),
        seen_ids=torch.from_numpy(seen_ids),
        seen_offsets=torch.from_numpy(seen_offsets),
        user_B=torch.from_numpy(rows.user_values("user_id")) if users else None,
    )
    return batch, Counts(int(start_B.sum()), int((~valid_B & (rows.group_B >= 0)).sum()))


def _seen(items: np.ndarray, length_B: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    example = np.repeat(np.arange(len(length_B)), length_B)
    keep = items != targets[example]
    # Raw ids are too large to stand beside the number of an example.
    distinct, place = np.unique(items[keep], return_inverse=True)
    bound = max(len(distinct), 1)
    keys = np.unique(example[keep] * bound + place)
    return distinct[keys % bound], _offsets(np.bincount(keys // bound, minlength=len(length_B)))


def times(rows: Rows, events: Events) -> Tensor | None:
    return torch.from_numpy(rows.values("timestamps", events)) if rows.timestamps else None


def item_ids(items: np.ndarray, length_B: np.ndarray) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[ITEM_FEATURE], values=torch.from_numpy(items), lengths=torch.from_numpy(length_B.astype(np.int64))
    )


def _offsets(length_B: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(length_B)]).astype(np.int64)


def ranges(start_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """The integers start[0] .. start[0] + length[0] - 1, then those from start[1] on, and so forth."""
    return np.repeat(start_B - _offsets(length_B)[:-1], length_B) + np.arange(int(length_B.sum()))

"""Rows of decoded row groups -> batches, by index arithmetic on packed arrays; no loop over examples.

B examples, T packed tokens. A window of an example is (start, length) in events from its oldest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import ITEM_FEATURE, EvaluationBatch, SequenceBatch
from gr.data.dataset import Histories


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
        lengths = np.zeros(len(self.row_B), dtype=np.int64)
        for index, group in enumerate(self.groups):
            chosen = self.group_B == index
            lengths[chosen] = group.lengths_B[self.row_B[chosen]]
        return lengths

    def gather(self, column: str, start_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """Packed values, int64 [sum(length_B)], of the window of each example."""
        offsets = _offsets(length_B)
        values = np.empty(offsets[-1], dtype=np.int64)
        for index, group in enumerate(self.groups):
            chosen = np.flatnonzero(self.group_B == index)
            lengths = length_B[chosen]
            source = group.offsets[self.row_B[chosen]] + start_B[chosen]
            values[_ranges(offsets[chosen], lengths)] = group.columns[column][_ranges(source, lengths)]
        return values


@dataclass(frozen=True)
class Counts:
    """What collation left out. truncated_tokens: inputs older than the window. without_target: empty examples."""

    truncated_tokens: int = 0
    without_target: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.truncated_tokens + other.truncated_tokens, self.without_target + other.without_target)


def collate_train(rows: Rows, *, max_length: int, holdout: int, first_example: int) -> tuple[SequenceBatch, Counts]:
    """Inputs and next items of each example, without its newest `holdout` events.

    With usable = items[:n - holdout], inputs are the newest max_length of usable[:-1] and targets the item after each.
    An example with fewer than two usable events is empty.
    """
    inputs_B = rows.lengths_B() - holdout - 1
    length_B = np.clip(inputs_B, 0, max_length)
    start_B = np.maximum(inputs_B, 0) - length_B
    times, next_times = _times(rows, start_B, length_B)
    batch = SequenceBatch(
        features=_features(rows.gather("item_ids", start_B, length_B), length_B),
        target_ids_T=torch.from_numpy(rows.gather("item_ids", start_B + 1, length_B)),
        timestamps_T=times,
        query_timestamps_T=next_times,
        first_example=first_example,
    )
    return batch, Counts(int(start_B.sum()), int((inputs_B < 1).sum()))


def collate_evaluation(
    rows: Rows, *, max_length: int, target_from_end: int, filter_seen: Literal["window", "all", "none"]
) -> tuple[EvaluationBatch, Counts]:
    """The newest max_length events before the target, and the target: the target_from_end-th event from the end.

    Examples without an event before the target are empty, not valid, with target 0. seen_ids of an example are
    ascending, unique and without its target; they come from the window, from all events before the target, or are
    none: on data with repeated targets filtering favours scorers that put seen items first (gr/data/oracle.py).
    """
    before_B = np.maximum(rows.lengths_B() - target_from_end, 0)
    valid_B = before_B > 0
    length_B = np.minimum(before_B, max_length)
    start_B = before_B - length_B
    targets = np.zeros(len(before_B), dtype=np.int64)
    targets[valid_B] = rows.gather("item_ids", before_B, valid_B.astype(np.int64))
    items = rows.gather("item_ids", start_B, length_B)
    whole = filter_seen == "all" and bool(start_B.any())
    seen = rows.gather("item_ids", np.zeros_like(start_B), before_B) if whole else items
    if filter_seen == "none":
        seen_ids, seen_offsets = np.empty(0, dtype=np.int64), np.zeros(len(before_B) + 1, dtype=np.int64)
    else:
        seen_ids, seen_offsets = _seen(seen, before_B if whole else length_B, targets)
    times, next_times = _times(rows, start_B, length_B)
    batch = EvaluationBatch(
        features=_features(items, length_B),
        timestamps_T=times,
        query_timestamps_T=next_times,
        target_ids_B=torch.from_numpy(targets),
        valid_B=torch.from_numpy(valid_B),
        seen_ids=torch.from_numpy(seen_ids),
        seen_offsets=torch.from_numpy(seen_offsets),
    )
    return batch, Counts(int(start_B.sum()), int((~valid_B & (rows.group_B >= 0)).sum()))


def _seen(items: np.ndarray, length_B: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    example = np.repeat(np.arange(len(length_B)), length_B)
    keep = items != targets[example]
    bound = int(items.max(initial=0)) + 1
    keys = np.unique(example[keep] * bound + items[keep])
    return keys % bound, _offsets(np.bincount(keys // bound, minlength=len(length_B)))


def _times(rows: Rows, start_B: np.ndarray, length_B: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
    if not rows.timestamps:
        return None, None
    times = rows.gather("timestamps", start_B, length_B)
    return torch.from_numpy(times), torch.from_numpy(rows.gather("timestamps", start_B + 1, length_B))


def _features(items: np.ndarray, length_B: np.ndarray) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[ITEM_FEATURE], values=torch.from_numpy(items), lengths=torch.from_numpy(length_B.astype(np.int64))
    )


def _offsets(length_B: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(length_B)]).astype(np.int64)


def _ranges(start_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """start[0] .. start[0] + length[0] - 1, then the same of 1, ..."""
    return np.repeat(start_B - _offsets(length_B)[:-1], length_B) + np.arange(int(length_B.sum()))

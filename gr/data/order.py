"""The training order: the row of the data that is the p-th example of each lane. See docs/design/data-order.md.

The order is a pure function of (seed, rows of each row group, lanes). It does not know the world size, so any number of
ranks that divides the lanes sees the same global batches.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gr.errors import ConfigError


def permutation(seed: int, epoch: int, row_group: int | None, size: int) -> np.ndarray:
    """A random order of range(size), int64 [size], keyed by (seed, epoch, row group).

    row_group: None orders the row groups themselves. Raw Philox words are sorted, as Generator.permutation may differ
    between numpy versions (NEP 19 freezes bit generators only).
    """
    word = (epoch << 32) | (0 if row_group is None else row_group + 1)
    bits = np.random.Philox(key=np.array([seed, word], dtype=np.uint64))
    return np.argsort(bits.random_raw(size), kind="stable")


class TrainingOrder:
    """The endless order of training examples, lane by lane.

    row_counts: rows of each row group, in file order; a row's number is its place in their concatenation.
    Raises ConfigError when there are more lanes than rows.
    """

    def __init__(self, row_counts: Sequence[int] | np.ndarray, *, lanes: int, seed: int, shuffle: bool) -> None:
        self._counts = np.asarray(row_counts, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])
        self.rows = int(self._starts[-1])
        self.lanes, self.seed, self.shuffle = lanes, seed, shuffle
        if self.rows < lanes:
            raise ConfigError(
                f"data.lanes={lanes} is more than the {self.rows} rows of the data; set data.lanes to a divisor of "
                f"trainer.global_batch_size that is at most {self.rows}"
            )
        self._bounds = [lane * self.rows // lanes for lane in range(lanes + 1)]
        self._group_order = lru_cache(maxsize=4)(self._shuffled_groups)
        self._row_order = lru_cache(maxsize=4 * lanes)(self._shuffled_rows)

    def lane_length(self, lane: int) -> int:
        """Examples of the lane in one epoch."""
        return self._bounds[lane + 1] - self._bounds[lane]

    def lane_rows(self, lane: int, position: int, count: int) -> np.ndarray:
        """The lane's row numbers in the global batch that starts at `position`, int64 [count].

        position: examples each lane gave before this batch. count: examples a lane gives to this batch.
        """
        if not self.shuffle:
            first = position * self.lanes + lane * count
            return np.arange(first, first + count, dtype=np.int64) % self.rows
        rows, length, done = np.empty(count, dtype=np.int64), self.lane_length(lane), 0
        while done < count:
            epoch, offset = divmod(position + done, length)
            size = min(count - done, length - offset)
            self._fill(rows[done : done + size], epoch, self._bounds[lane] + offset)
            done += size
        return rows

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row group of each row number, and the row within the group: int64 of the same shape."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        return groups, rows - self._starts[groups]

    def _fill(self, rows: np.ndarray, epoch: int, first: int) -> None:
        """Writes the row numbers that begin at place `first` of the epoch."""
        order, starts = self._group_order(epoch)
        slot, done = int(np.searchsorted(starts, first, side="right")) - 1, 0
        while done < len(rows):
            place, group = first + done, int(order[slot])
            size = min(len(rows) - done, int(starts[slot + 1]) - place)
            start = place - int(starts[slot])
            rows[done : done + size] = self._row_order(epoch, group)[start : start + size]
            rows[done : done + size] += self._starts[group]
            done, slot = done + size, slot + 1

    def _shuffled_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(self.seed, epoch, None, len(self._counts))
        return order, np.concatenate([[0], np.cumsum(self._counts[order])])

    def _shuffled_rows(self, epoch: int, group: int) -> np.ndarray:
        return permutation(self.seed, epoch, group, int(self._counts[group]))


def owned_lanes(lanes: int, rank: int, world_size: int) -> range:
    """Lanes of one rank. Raises ConfigError unless the world size divides the lanes."""
    if lanes % world_size:
        allowed = [size for size in range(1, lanes + 1) if lanes % size == 0]
        raise ConfigError(
            f"data.lanes={lanes} is not divisible by the world size {world_size}; run on one of {allowed} ranks, or "
            f"set data.lanes to a multiple of {world_size}"
        )
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)

"""Events in file order -> a data folder, for logs larger than memory: by user to files on disk, then each is sorted.

Peak memory: one partition, about 2 million events, three times (as read, its order, sorted), beside a block of the
source and a count for each item. The partitions take the bytes of a record an event on the disk of --out.

B users, T events.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from gr.errors import DataError
from gr.logging import get_logger
from gr.prepare.write import ROWS_PER_GROUP, FolderWriter, Users

log = get_logger(__name__)
EVENTS_PER_PARTITION = 2_000_000
EVENTS_PER_GROUP = 1_000_000  # of a row group, if it has more than one user
Columns = Callable[[np.ndarray], Mapping[str, np.ndarray]]
_LARGEST_ITEM = 2**31 - 2


class UserPartitions:
    """Events by user, on disk. fields: those of an event beside user, time and item, each with its numpy type."""

    def __init__(self, folder: Path, fields: Mapping[str, str], *, expected_events: int) -> None:
        """folder: empty, and not that of the result. expected_events: sets the number of partitions."""
        self.dtype = np.dtype([("user", "<i8"), ("time", "<i8"), ("item", "<i8"), *fields.items()])
        self._folder, self._number = folder, max(1, math.ceil(expected_events / EVENTS_PER_PARTITION))
        self._seen = np.zeros(0, dtype=bool)
        self.events, self.largest_user = 0, -1

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append events, in file order. The caller has checked that users and items are 0 or more, and items int32."""
        records = np.empty(len(columns["user"]), dtype=self.dtype)
        for name in self.dtype.names or ():
            records[name] = columns[name]
        self._see(records["item"])
        self.largest_user = max(self.largest_user, int(records["user"].max(initial=-1)))
        self.events += len(records)
        places = records["user"] % self._number
        records = records[np.argsort(places, kind="stable")]
        ends = np.cumsum(np.bincount(places, minlength=self._number))
        for number, part in enumerate(np.split(records, ends[:-1])):
            if len(part):
                with self._file(number).open("ab") as file:
                    file.write(part.tobytes())

    @property
    def items(self) -> np.ndarray:
        """Distinct items, ascending."""
        return np.flatnonzero(self._seen)

    def sorted(self) -> Iterator[np.ndarray]:
        """Records by user and time, ties as they were added; the users of a partition together."""
        for number in tqdm(range(self._number), desc="sort", unit="partition", disable=None):
            if self._file(number).exists():
                records = np.fromfile(self._file(number), dtype=self.dtype)
                self._file(number).unlink()
                yield records[np.lexsort((records["time"], records["user"]))]  # a stable sort

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.events"

    def _see(self, items_T: np.ndarray) -> None:
        largest = int(items_T.max(initial=0))
        if largest >= len(self._seen):
            grown = np.zeros(max(largest + 1, min(2 * len(self._seen), _LARGEST_ITEM + 1)), dtype=bool)
            grown[: len(self._seen)] = self._seen
            self._seen = grown
        self._seen[items_T] = True


class BadEvents:
    """What to do with an event that is none: DataError, or it is left out and counted under its first bad column."""

    def __init__(self, policy: Literal["fail", "skip"]) -> None:
        self.skip, self.counts = policy == "skip", Counter[str]()

    def note(self) -> str | None:
        """What was left out, for schema.json; also logged."""
        if not self.counts:
            return None
        text = f"{self.counts.total()} bad events left out: {', '.join(f'{k} {n}' for k, n in self.counts.items())}"
        log.warning(text)
        return text


class Checks:
    """The checks of one block. where: its file, what its places are called (line, row) and the number of the first."""

    def __init__(self, bad: BadEvents, where: tuple[object, str, int], events: int) -> None:
        self._bad, self._where = bad, where
        self.good_T = np.ones(events, dtype=bool)

    def wrong(self, column: str, wrong_T: np.ndarray, problem: Callable[[int], str]) -> None:
        """Raises DataError naming file, place, column and problem(place in the block), or counts and marks them."""
        wrong_T = wrong_T & self.good_T
        if not wrong_T.any():
            return
        file, unit, start = self._where
        first = int(wrong_T.argmax())
        if not self._bad.skip:
            raise DataError(f"{file}, {unit} {start + first}, column {column}: {problem(first)}")
        self._bad.counts[column] += int(wrong_T.sum())
        self.good_T &= ~wrong_T

    def range(self, column: str, values_T: np.ndarray, low: int, high: int) -> None:
        outside_T = (values_T < low) | (values_T > high)
        self.wrong(column, outside_T, lambda place: f"is {values_T[place]}, allowed are {low} to {high}")


def write_users(
    partitions: UserPartitions, writer: FolderWriter, contextual: Columns, of_items: Columns = lambda items_T: {}
) -> None:
    """Write every partition's users. contextual: columns [B] of users [B]. of_items: columns [T] of items [T]."""
    names = (partitions.dtype.names or ())[3:]
    for records in partitions.sorted():
        starts = np.flatnonzero(np.diff(records["user"], prepend=-1))
        for first, stop in _groups(np.append(starts, len(records))):
            offsets = np.append(starts, len(records))[first : stop + 1]
            part = records[offsets[0] : offsets[-1]]
            users = records["user"][offsets[:-1]]
            columns = {name: part[name] for name in names} | dict(of_items(part["item"])) | dict(contextual(users))
            writer.write(Users(users, offsets - offsets[0], part["item"], timestamps=part["time"], columns=columns))


def _groups(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first user, stop user) of row groups: at most ROWS_PER_GROUP users, and EVENTS_PER_GROUP events or one user."""
    first = 0
    while first < len(offsets) - 1:
        by_events = int(np.searchsorted(offsets, offsets[first] + EVENTS_PER_GROUP, side="right")) - 1
        stop = min(max(by_events, first + 1), first + ROWS_PER_GROUP, len(offsets) - 1)
        yield first, stop
        first = stop

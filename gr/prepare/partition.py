"""Events in file order -> a data folder, for logs larger than memory: by user to files on disk, then each is sorted.

Peak memory: one partition, about 2 million events, three times (as read, its order, sorted), beside a block of the
source and a count for each item. The partitions take the bytes of a record an event on the disk of --out.

B users, T events.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gr.prepare.delimited import require_dense
from gr.prepare.write import ROWS_PER_GROUP, FolderWriter, Users, repeated_events

EVENTS_PER_PARTITION = 2_000_000
EVENTS_PER_GROUP = 1_000_000  # limit of a row group that has more than one user
Columns = Callable[[np.ndarray], Mapping[str, np.ndarray]]
_LARGEST_ITEM = 2**31 - 2


@contextmanager
def partitioned(
    blocks: Iterable[Mapping[str, np.ndarray]], fields: Mapping[str, str], *, beside: Path, expected_events: int
) -> "Iterator[UserPartitions]":
    """All events of `blocks` by user, in a temporary folder beside the given one."""
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}.events.", dir=beside.parent) as place:
        partitions = UserPartitions(Path(place), fields, expected_events=expected_events)
        for columns in blocks:
            partitions.add(columns)
        yield partitions


class UserPartitions:
    """Events by user, on disk. repeated: events sorted so far that have the user, time and item of an earlier one."""

    def __init__(self, folder: Path, fields: Mapping[str, str], *, expected_events: int) -> None:
        """folder: empty. fields: further fields of an event, beside user, time and item, each with its numpy type.
        expected_events: sets the number of partitions.
        """
        self.dtype = np.dtype([("user", "<i8"), ("time", "<i8"), ("item", "<i8"), *fields.items()])
        self._folder, self._number = folder, max(1, math.ceil(expected_events / EVENTS_PER_PARTITION))
        self._expected, self._seen = expected_events, np.zeros(0, dtype=bool)
        self.events, self.repeated, self.largest_user = 0, 0, -1

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append events, in file order. The caller has checked that users and items are 0 or more, and items int32.

        DataError for ids that are far more than the events.
        """
        records = np.empty(len(columns["user"]), dtype=self.dtype)
        for name in self.dtype.names or ():
            records[name] = columns[name]
        self.largest_user = max(self.largest_user, int(records["user"].max(initial=-1)))
        self.events += len(records)
        rows = max(self.events, self._expected)
        require_dense("the events", "user id", self.largest_user, rows)
        require_dense("the events", "item id", int(records["item"].max(initial=0)), rows)
        self._mark_seen(records["item"])
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
                records = records[np.lexsort((records["time"], records["user"]))]  # a stable sort
                self.repeated += repeated_events(records["user"], records["time"], records["item"])
                yield records

    def write_users(self, writer: FolderWriter, contextual: Columns, of_items: Columns = lambda items_T: {}) -> None:
        """Write all users. contextual: columns [B] of users [B]. of_items: columns [T] of items [T]."""
        names = (self.dtype.names or ())[3:]
        for records in self.sorted():
            starts = np.append(np.flatnonzero(np.diff(records["user"], prepend=-1)), len(records))
            for first, stop in _groups(starts):
                offsets = starts[first : stop + 1]
                part = records[offsets[0] : offsets[-1]]
                users = records["user"][offsets[:-1]]
                columns = {name: part[name] for name in names} | dict(of_items(part["item"])) | dict(contextual(users))
                writer.write(Users(users, offsets - offsets[0], part["item"], timestamps=part["time"], columns=columns))
                writer.end_group()

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.events"

    def _mark_seen(self, items_T: np.ndarray) -> None:
        largest = int(items_T.max(initial=0))
        if largest >= len(self._seen):
            grown = np.zeros(max(largest + 1, min(2 * len(self._seen), _LARGEST_ITEM + 1)), dtype=bool)
            grown[: len(self._seen)] = self._seen
            self._seen = grown
        self._seen[items_T] = True


def _groups(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first user, stop user) of row groups: at most ROWS_PER_GROUP users, and EVENTS_PER_GROUP events or one user."""
    first = 0
    while first < len(offsets) - 1:
        by_events = int(np.searchsorted(offsets, offsets[first] + EVENTS_PER_GROUP, side="right")) - 1
        stop = min(max(by_events, first + 1), first + ROWS_PER_GROUP, len(offsets) - 1)
        yield first, stop
        first = stop

"""Amazon Books ratings (ratings_Books.csv, 22.5 M lines), filtered as the reference of arXiv 2402.17152 does.

One pass, not repeated: keep lines whose item and whose user have at least 5 lines in the raw file; number the kept
items, and users, in sorted order of their names, from 1; sort by time, ties in file order; drop users with fewer than
5 events left. Items keep their numbers even if all their users are dropped, so the corpus is every kept item.

T events.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.errors import DataError
from gr.prepare.delimited import SECONDS, Lines, Name, Stars
from gr.prepare.ratings import STABLE_ORDER, group_users
from gr.prepare.source import Source
from gr.prepare.write import write_folder
from gr.schema import DataSchema

_MIN_EVENTS = 5
_LINES = Lines(",", {"user": Name(), "item": Name(), "rating": Stars(1, 1), "time": SECONDS})


def prepare_amazon_books(source: Source, folder: Path) -> DataSchema:
    """Write amazon-books into an empty folder. Needs ratings_Books.csv: lines of user,item,rating,seconds, no
    header.
    """
    file = source.require("ratings_Books.csv")
    events = _LINES.read(file)
    users, user_names = _codes(events["user"])
    items, item_names = _codes(events["item"])
    enough = (np.bincount(users) >= _MIN_EVENTS)[users] & (np.bincount(items) >= _MIN_EVENTS)[items]
    if not enough.any():
        raise DataError(f"{file}: no line has an item and a user with {_MIN_EVENTS} lines each")
    users, _ = _renumber(users[enough], user_names)
    items, item_count = _renumber(items[enough], item_names)
    long = (np.bincount(users) >= _MIN_EVENTS)[users]
    if not long.any():
        raise DataError(f"{file}: no user has {_MIN_EVENTS} events left after filtering")
    times, ratings = (events[name][enough][long] for name in ("time", "rating"))
    grouped, stated = group_users(file, users[long], items[long], times, ratings)
    return write_folder(
        folder,
        grouped,
        corpus=np.arange(1, item_count + 1),
        name="amazon-books",
        order=STABLE_ORDER.format(file=file.name),
        source=f"{stated}; items and users with >= {_MIN_EVENTS} lines, then users with >= {_MIN_EVENTS} events",
    )


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Codes int32 [T] into one array of unique names, in order of first sight."""
    unified = column.unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in unified.chunks])
    return codes, unified.chunk(0).dictionary


def _renumber(codes: np.ndarray, names: pa.Array) -> tuple[np.ndarray, int]:
    """Number the names that occur from 1, in sorted order (bytes of UTF-8). Numbers int32 [T], and how many."""
    present = np.flatnonzero(np.bincount(codes, minlength=len(names)))
    order = pc.sort_indices(names.take(pa.array(present))).to_numpy()
    numbers = np.zeros(len(names), dtype=np.int32)
    numbers[present[order]] = np.arange(1, len(present) + 1)
    return numbers[codes], len(present)

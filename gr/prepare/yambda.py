"""Yambda-50m, -500m and -5b (huggingface.co/datasets/yandex/yambda), the flat files as published.

Events of all kinds in one history: a listen, a like and so on are bits of the column actions. Ids are the published
ones; artist and album ids + 1, the smallest where an item has several. Timestamps are seconds since a day that is not
published, in steps of 5 (in the published previews all are multiples of 5, and the largest, 26.0 M, is 300 days of
seconds). The real files were not read in this project, only generated ones of that layout. Peak memory of those, with
1,000 users of whom one has a tenth of the events: 0.5 GB for 4 million, 0.6 GB for 16 million
(benchmarks/prepare_histories.py).

T events of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from gr.data.parquet import read_footer
from gr.errors import DataError
from gr.logging import get_logger
from gr.prepare.delimited import require_dense
from gr.prepare.lines import BadRows, Fault, OnBadRow
from gr.prepare.partition import partitioned
from gr.prepare.write import FolderWriter
from gr.schema import DataSchema, HistoryColumns

log = get_logger(__name__)

EVENTS = {"listens": "listen", "likes": "like", "dislikes": "dislike", "unlikes": "unlike", "undislikes": "undislike"}
ACTIONS = ("listen", "listen_plus", "like", "dislike", "unlike", "undislike")
LISTENED = 50  # listen_plus: more than this many hundredths of the track, as the data set's card defines it
_ALL = "multi_event"
_BITS = {kind: 1 << ACTIONS.index(kind) for kind in EVENTS.values()}
_WHOLE = ("uid", "timestamp", "item_id", "is_organic")
_RANGES = {
    "uid": (0, 2**31 - 4),
    "timestamp": (0, 10**9),
    "item_id": (1, 2**31 - 3),
    "is_organic": (0, 1),
    "played_ratio_pct": (0, 2**31 - 1),
}
_FIELDS = {"actions": "<i4", "played_ratio": "<f4", "organic": "<i4"}
_ROWS = 1 << 18
_CONVENTIONS = (
    "timestamps in seconds since an unpublished day, in steps of 5; user, artist and album are the published ids + 1, "
    "the least of several; organic 1 no and 2 yes"
)


def prepare_yambda(size: str, source: Path, folder: Path, on_bad_row: OnBadRow = "fail") -> DataSchema:
    """Write yambda-50m, -500m or -5b into an empty folder. size: 50m, 500m or 5b. source: the folder with flat/ in it.
    on_bad_row: skip leaves bad rows of events out, counted.

    Reads flat/SIZE/multi_event.parquet, or without it the five files of single kinds, ties in their order;
    and the mappings of artists and albums. DataError for a missing or damaged file, a missing column, another type and
    a value out of its range, naming file, row and column.
    """
    files = _files(source / "flat" / size)
    artists, albums = (_mapping(source / f"{name}_item_mapping.parquet", f"{name}_id") for name in ("artist", "album"))
    bad = BadRows(on_bad_row)
    expected = sum(read_footer(file).num_rows for file in files)
    blocks = _with_progress((block for file in files for block in _events(file, bad)), expected, f"yambda-{size}")
    with partitioned(blocks, _FIELDS, beside=folder, expected_events=expected) as partitions:
        if not partitions.events:
            raise DataError(f"{files[0]}: has no events")
        declared = HistoryColumns(
            timestamps=True,
            actions=list(ACTIONS),
            values=["played_ratio"],
            event_features={"artist": int(artists.max()) + 1, "album": int(albums.max()) + 1, "organic": 3},
            contextual={"user": partitions.largest_user + 2},
        )
        items = partitions.items
        writer = FolderWriter(folder, declared, item_cardinality=int(items[-1]) + 1)
        partitions.write_users(
            writer,
            contextual=lambda users_B: {"user": users_B + 1},
            of_items=lambda items_T: {"artist": _mapped(artists, items_T), "album": _mapped(albums, items_T)},
        )
    notes = [*map(str, files), *bad.note()]
    if partitions.repeated:
        notes.append(f"{partitions.repeated} events repeat the user, time and item of another, and are kept")
    for name, mapping in (("artist", artists), ("album", albums)):
        if count := int((_mapped(mapping, items) == 0).sum()):
            notes.append(f"{count} items without {name}")
    return writer.close(
        name=f"yambda-{size}",
        order="by timestamp within each user; ties in the order of the files in `source`, then of their rows (stable)",
        source="; ".join([*notes, _CONVENTIONS]),
        corpus=items,
    )


class _Checks:
    """Checks of the rows of one block. first_row: its number in the file."""

    def __init__(self, file: Path, bad: BadRows, first_row: int, rows: int) -> None:
        self._file, self._bad, self._first_row = file, bad, first_row
        self.good_T = np.ones(rows, dtype=bool)

    def wrong(self, column: str, wrong_T: np.ndarray, problem: Callable[[int], str]) -> None:
        """Mark rows as bad that were good so far. problem: states what is wrong with a row of the block."""
        for row in np.flatnonzero(wrong_T & self.good_T).tolist():
            self._bad.add(self._file, f"row {self._first_row + row}", Fault(column, problem(row), column))
        self.good_T &= ~wrong_T

    def range(self, column: str, values_T: np.ndarray, low: int, high: int) -> None:
        outside_T = (values_T < low) | (values_T > high)
        self.wrong(column, outside_T, lambda row: f"is {values_T[row]}, allowed are {low} to {high}")

    def whole(self, column: str, values: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int64 [T], nulls 0 and marked. DataError for another type than whole numbers."""
        if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
            raise DataError(f"{self._file}: column {column} has type {values.type}, wanted whole numbers")
        if values.null_count:
            self.wrong(column, values.is_null().to_numpy(zero_copy_only=False), lambda row: "is null")
        return values.cast(pa.int64()).fill_null(0).to_numpy()


def _files(folder: Path) -> list[Path]:
    if (folder / f"{_ALL}.parquet").is_file():
        return [folder / f"{_ALL}.parquet"]
    files = [folder / f"{name}.parquet" for name in EVENTS]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(
            f"{folder}: has neither {_ALL}.parquet nor {', '.join(missing)}; give --source the folder that holds "
            "flat/, artist_item_mapping.parquet and album_item_mapping.parquet"
        )
    log.info("%s: no %s.parquet, reading %s", folder, _ALL, ", ".join(EVENTS))
    return files


def _mapping(file: Path, name: str) -> np.ndarray:
    """int64 [largest item + 1]: id + 1 of each item, the smallest of several; 0 where it has none."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; --source needs it beside flat/")
    with _opened(file, (name, "item_id")) as parquet:
        table = parquet.read(columns=[name, "item_id"])
    checks = _Checks(file, BadRows(), 0, table.num_rows)
    items, ids = (checks.whole(column, table.column(column)) for column in ("item_id", name))
    for column, values in (("item_id", items), (name, ids)):
        checks.range(column, values, 0, 2**31 - 4)
    if not len(items):
        raise DataError(f"{file}: has no rows")
    for column, values in (("item_id", items), (name, ids)):
        require_dense(file, column, int(values.max()), len(items))
    smallest = np.full(int(items.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, items, ids + 1)
    return np.where(smallest == np.iinfo(np.int64).max, 0, smallest)


def _mapped(mapping: np.ndarray, items_T: np.ndarray) -> np.ndarray:
    return np.where(items_T < len(mapping), mapping[np.minimum(items_T, len(mapping) - 1)], 0)


@contextmanager
def _opened(file: Path, needed: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """The Parquet file. DataError where a column is missing, or a block of it cannot be read."""
    read_footer(file)
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if missing := [name for name in needed if name not in names]:
                raise DataError(f"{file}: has no column {', '.join(missing)}; its columns are {', '.join(names)}")
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be decoded, it is damaged or cut off: {error}") from error


def _events(file: Path, bad: BadRows) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of the columns user, time, item and _FIELDS [T], in file order."""
    kind = EVENTS.get(file.stem)
    needed = [*_WHOLE]
    if kind in (None, "listen"):
        needed.append("played_ratio_pct")
    if kind is None:
        needed.append("event_type")
    first_row = 0
    with _opened(file, needed) as parquet:
        for block in parquet.iter_batches(_ROWS, columns=needed):
            checks = _Checks(file, bad, first_row, block.num_rows)
            columns = _block(file, block, kind, checks)
            yield {name: column[checks.good_T] for name, column in columns.items()}
            first_row += block.num_rows


def _block(file: Path, block: pa.RecordBatch, kind: str | None, checks: _Checks) -> dict[str, np.ndarray]:
    raw = {name: checks.whole(name, block.column(name)) for name in _WHOLE}
    if kind is None:
        bits = _kinds(file, block.column("event_type"), checks)
    else:
        bits = np.full(block.num_rows, _BITS[kind], dtype=np.int32)
    played = np.zeros(block.num_rows, dtype=np.int64)
    if "played_ratio_pct" in block.schema.names:
        column, is_listen = block.column("played_ratio_pct"), bits == _BITS["listen"]
        missing = column.is_null().to_numpy(zero_copy_only=False) & is_listen
        checks.wrong("played_ratio_pct", missing, lambda row: "is null for a listen")
        played = np.where(is_listen, checks.whole("played_ratio_pct", column.fill_null(0)), 0)
    for name, values in (*raw.items(), ("played_ratio_pct", played)):
        checks.range(name, values, *_RANGES[name])
    return {
        "user": raw["uid"],
        "time": raw["timestamp"],
        "item": raw["item_id"],
        "actions": bits | np.where(played > LISTENED, 1 << ACTIONS.index("listen_plus"), 0),
        "played_ratio": played / 100,
        "organic": raw["is_organic"] + 1,
    }


def _kinds(file: Path, column: pa.Array, checks: _Checks) -> np.ndarray:
    """The bit of each event, int32 [T]. Text, or a dictionary of text."""
    names = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    if not (pa.types.is_string(names.type) or pa.types.is_large_string(names.type)):
        raise DataError(f"{file}: column event_type has type {column.type}, wanted text")
    place = pc.index_in(names, value_set=pa.array(list(_BITS), type=names.type)).fill_null(-1).to_numpy()
    allowed = ", ".join(_BITS)
    checks.wrong("event_type", place < 0, lambda event: f"is {names[event].as_py()!r}, allowed are {allowed}")
    return np.array(list(_BITS.values()), dtype=np.int32)[place]


def _with_progress(
    blocks: Iterator[dict[str, np.ndarray]], expected: int, title: str
) -> Iterator[dict[str, np.ndarray]]:
    with tqdm(total=expected, unit="event", unit_scale=True, desc=title, disable=None) as bar:
        for columns in blocks:
            yield columns
            bar.update(len(columns["user"]))

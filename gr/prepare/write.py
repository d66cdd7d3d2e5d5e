"""Writes data folders: whole or not at all.

B users, T events, packed user after user, oldest first.
"""

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import DataError, TransientError
from gr.files import is_transient
from gr.schema import FORMAT_VERSION, ITEMS_FILE, SCHEMA_FILE, UNCOUNTED_EVENTS, DataSchema, HistoryColumns

ROWS_PER_GROUP = 512
GROUPS_PER_PART = 128


@dataclass(frozen=True)
class Users:
    """Some users and their events. offsets: int64 [B + 1]. timestamps: int64 [T]. ratings: float32 [T].

    columns: further ones by name, as HistoryColumns declares them: actions, values and event features [T], contextual
    features [B].
    """

    user_ids: np.ndarray
    offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray | None = None
    ratings: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def column(self, name: str) -> np.ndarray:
        return self.columns[name] if name in self.columns else getattr(self, name)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns failures for want of room, memory or rights into a DataError, or a TransientError where it may pass."""
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{out}: needs more memory than there is: {error}; ask for less") from error
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        if error.filename is not None and not Path(error.filename).absolute().is_relative_to(out.parent.absolute()):
            message, remedy = f"{error.filename}: cannot be read: {reason}", "name what this user may read"
        else:
            message, remedy = f"{out}: cannot be written: {reason}", "make room, or choose another --out"
        if is_transient(error):
            raise TransientError(message) from error
        raise DataError(f"{message}; {remedy}") from error


@contextmanager
def atomic_folder(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place if the block succeeds and vanishes if it fails.

    Raises DataError if `out` exists and force is not set, and as `writing` does.
    """
    with writing(out), _replacement(out, force) as folder:
        yield folder


@contextmanager
def _replacement(out: Path, force: bool) -> Iterator[Path]:
    require_replaceable(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            out.rename(old / out.name)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_replaceable(out: Path, force: bool) -> None:
    """DataError if `out` exists, unless force is set and it is an empty folder, a data folder or train/ and test/."""
    if not out.exists():
        return
    if not force:
        raise DataError(f"{out}: exists already; pass --force to replace it, or choose another --out")
    schemas = (out / SCHEMA_FILE, out / "train" / SCHEMA_FILE)
    if not (out.is_dir() and (not any(out.iterdir()) or any(schema.is_file() for schema in schemas))):
        raise DataError(f"{out}: is no data folder, so --force does not replace it; choose another --out")


class PartWriter:
    """Writes tables as part-00000.parquet, part-00001.parquet, ... in row groups, whatever their rows come in.

    Memory: less than a row group, and what one call brings.
    """

    def __init__(
        self,
        folder: Path,
        group_rows: int,
        *,
        groups_per_part: int | None = None,
        rows_per_part: int | None = None,
        first_part: int = 0,
        plain: Collection[str] = (),
    ) -> None:
        """A part ends after groups_per_part row groups or rows_per_part rows, where given.

        plain: columns of values that hardly repeat, for which a dictionary would only be larger and slower to write.
        """
        self._folder, self._group_rows, self._first_part = folder, group_rows, first_part
        self._plain = plain
        self._groups_per_part, self._rows_per_part = groups_per_part, rows_per_part
        self._pending: pa.Table | None = None
        self._writer: pq.ParquetWriter | None = None
        self._part_rows = self._part_groups = 0
        self.rows = self.parts = 0

    def write(self, table: pa.Table) -> None:
        """Append rows; those that do not fill a row group wait for more."""
        self._pending = table if self._pending is None else pa.concat_tables([self._pending, table])
        while self._pending.num_rows >= self._rows_of_next_group():
            self._write_group(self._rows_of_next_group())

    def end_group(self) -> None:
        """Write the rows that wait as a row group of their own."""
        if self._pending is not None and self._pending.num_rows:
            self._write_group(self._pending.num_rows)

    def end_part(self) -> None:
        """Finish the file; the next row begins another."""
        self.end_group()
        self._close_file()

    def _rows_of_next_group(self) -> int:
        if self._rows_per_part is None:
            return self._group_rows
        return min(self._group_rows, self._rows_per_part - self._part_rows)

    def _write_group(self, rows: int) -> None:
        assert self._pending is not None
        group, self._pending = self._pending.slice(0, rows), self._pending.slice(rows)
        if self._writer is None:
            part = self._folder / part_name(self._first_part + self.parts)
            repeating = [
                f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
                for field in group.schema
                if field.name not in self._plain
            ]
            self._writer = pq.ParquetWriter(
                part, group.schema, use_dictionary=repeating, compression="zstd", write_page_checksum=True
            )
            self.parts += 1
        self._writer.write_table(group, row_group_size=rows)
        self.rows += rows
        self._part_rows += rows
        self._part_groups += 1
        if self._part_rows == self._rows_per_part or self._part_groups == self._groups_per_part:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._part_rows, self._part_groups = None, 0, 0


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


class FolderWriter:
    """Writes parts as users come, in the order given, then items.parquet and schema.json."""

    def __init__(self, folder: Path, columns: HistoryColumns, *, item_cardinality: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._cardinality, self._columns = folder, item_cardinality, columns
        self._types = column_types(columns, item_cardinality)
        self._counts = np.zeros(item_cardinality, dtype=np.int64)
        self._events = 0
        self._parts = PartWriter(
            folder, ROWS_PER_GROUP, groups_per_part=GROUPS_PER_PART, plain=("user_id", "timestamps")
        )

    def write(self, users: Users) -> None:
        """Append users, in row groups of ROWS_PER_GROUP."""
        np.add.at(self._counts, users.item_ids[_fitted(users.offsets)], 1)
        offsets = plain_array(users.offsets.astype(np.int32))
        arrays = {"user_id": plain_array(users.user_ids, pa.int64())}
        for name in self._columns.event_columns:
            arrays[name] = pa.ListArray.from_arrays(offsets, plain_array(users.column(name), self._types[name]))
        for name in self._columns.user_columns:
            arrays[name] = plain_array(users.column(name), self._types[name])
        self._parts.write(pa.Table.from_arrays(list(arrays.values()), names=list(arrays)))
        self._events += len(users.item_ids)

    def end_group(self) -> None:
        """End the row group, so that the next user begins another."""
        self._parts.end_group()

    def close(
        self,
        *,
        name: str,
        order: str,
        source: str,
        corpus: np.ndarray,
        vocabularies: Mapping[str, str] = MappingProxyType({}),
        item_features: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> DataSchema:
        """Finish the folder. corpus: candidate item ids. Raises DataError if no user was written.

        item_features: of the event features that an item determines, the ids by item, [item_cardinality].
        """
        self._parts.end_part()
        if not self._parts.rows:
            raise DataError(f"{source}: no user is left to write")
        corpus = np.unique(corpus).astype(np.int64)
        features = {name: plain_array(ids[corpus], self._types[name]) for name, ids in item_features.items()}
        columns = {"item_id": plain_array(corpus), "count": plain_array(self._counts[corpus]), **features}
        items = pa.Table.from_arrays(list(columns.values()), names=list(columns))
        pq.write_table(items, self._folder / ITEMS_FILE, write_page_checksum=True)
        schema = DataSchema(
            format_version=FORMAT_VERSION,
            name=name,
            item_cardinality=self._cardinality,
            order=order,
            source=source,
            users=self._parts.rows,
            events=self._events,
            items=len(corpus),
            vocabularies=dict(vocabularies),
            **self._columns.model_dump(),
        )
        schema.save(self._folder)
        return schema


def column_types(columns: HistoryColumns, item_cardinality: int) -> dict[str, pa.DataType]:
    """Type of an element of each column, as written."""

    def ids(cardinality: int) -> pa.DataType:
        return pa.int32() if cardinality <= np.iinfo(np.int32).max else pa.int64()

    return {
        "item_ids": ids(item_cardinality),
        "timestamps": pa.int64(),
        "ratings": pa.float32(),
        "actions": pa.int32(),
        **dict.fromkeys([*columns.values, *columns.contextual_numeric], pa.float32()),
        **{name: ids(size) for name, size in (columns.event_features | columns.contextual).items()},
    }


def write_folder(
    folder: Path,
    users: Users,
    *,
    corpus: np.ndarray,
    name: str,
    order: str,
    source: str,
    columns: HistoryColumns | None = None,
) -> DataSchema:
    """Write users that are in memory as a data folder; rows of the item table = largest id of the corpus + 1.

    columns: unset where users have no more than timestamps and ratings.
    """
    if columns is None:
        columns = HistoryColumns(timestamps=users.timestamps is not None, ratings=users.ratings is not None)
    writer = FolderWriter(folder, columns, item_cardinality=int(corpus.max()) + 1)
    writer.write(users)
    return writer.close(name=name, order=order, source=source, corpus=corpus)


def plain_array(values: np.ndarray, kind: pa.DataType | None = None) -> pa.Array:
    """Numbers as an Arrow array, without a copy where `kind` is theirs; ValueError where an integer does not fit.

    pyarrow.array and to_numpy import pandas wherever it is installed, which takes longer than to prepare a small log.
    """
    if kind is None:
        kind = pa.from_numpy_dtype(values.dtype)
    cast = np.ascontiguousarray(values, dtype=kind.to_pandas_dtype())
    if values.dtype.kind in "iu" and cast.dtype != values.dtype and not np.array_equal(cast, values):
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit {kind}")
    return pa.Array.from_buffers(kind, len(cast), [None, pa.py_buffer(cast)])


def plain_table(columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Numbers by name as a table."""
    return pa.Table.from_arrays([plain_array(values) for values in columns.values()], names=list(columns))


def plain_values(array: pa.Array) -> np.ndarray:
    """The numbers of an Arrow array that has no null, without a copy."""
    assert not array.null_count
    kind = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype=kind, count=len(array), offset=array.offset * kind.itemsize)


def plain_block(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """The columns of a batch of numbers, by name."""
    return {name: plain_values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _fitted(offsets: np.ndarray) -> np.ndarray:
    """bool [T]: all events but the newest UNCOUNTED_EVENTS of each user."""
    from_end = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(offsets[-1])
    return from_end > UNCOUNTED_EVENTS


def repeated_events(users_T: np.ndarray, times_T: np.ndarray, items_T: np.ndarray) -> int:
    """The number of events that repeat another in user, time and item. Those of a user and time stand side by side."""
    same_T = np.append(False, (users_T[1:] == users_T[:-1]) & (times_T[1:] == times_T[:-1]))
    tied_T = same_T | np.append(same_T[1:], False)
    group_T, item_T = np.cumsum(~same_T)[tied_T], items_T[tied_T]
    order = np.lexsort((item_T, group_T))
    return int(((np.diff(group_T[order]) == 0) & (np.diff(item_T[order]) == 0)).sum())

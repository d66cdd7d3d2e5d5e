"""Reads a data folder row group by row group. Checks every row as it is read; never holds the whole set.

B rows (users), T events of those rows, packed row after row, oldest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import Fault, check_rows, expected_types, packed
from gr.errors import DataError
from gr.schema import ITEMS_FILE, PART_PATTERN, DataSchema


@dataclass(frozen=True)
class RowGroup:
    """Where a row group is: its file, its index there, its rows."""

    file: Path
    index: int
    rows: int

    def __str__(self) -> str:
        return f"{self.file}: row group {self.index}"


@dataclass(frozen=True)
class Histories:
    """The users of one row group.

    offsets: int64 [B + 1] into the packed columns. columns: packed arrays [T] by name (item_ids and timestamps int64,
    ratings float32), and [B] for user_id and contextual columns.
    """

    offsets: np.ndarray
    columns: dict[str, np.ndarray]

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.offsets)


class Dataset:
    """A data folder: schema, row groups known from footers, and rows read on demand. Safe to read from threads."""

    def __init__(
        self, path: Path, schema: DataSchema, row_groups: list[RowGroup], metadata: dict[Path, pq.FileMetaData]
    ):
        self.path, self.schema, self.row_groups = path, schema, row_groups
        self._metadata = metadata
        self._bad_rows: dict[int, int] = {}

    @classmethod
    def open(cls, path: Path | str) -> "Dataset":
        """Read schema.json and the footers of the parts.

        Raises DataError, naming file and column, for a missing folder, schema or part, a file that is not Parquet or
        was cut off, a part without rows, a missing column, a wrong type, or fewer rows than the schema says.
        """
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; write a data folder with `gr prepare ... --out {path}`")
        schema = DataSchema.load(path)
        files = sorted(path.glob(PART_PATTERN))
        if not files:
            raise DataError(f"{path}: has no {PART_PATTERN}; write the folder again with `gr prepare --force`")
        row_groups, metadata = [], {}
        for file in files:
            metadata[file] = footer = _read_footer(file)
            if footer.num_rows == 0:
                raise DataError(f"{file}: has no rows; remove the file or write the folder again")
            _check_types(file, footer.schema.to_arrow_schema(), schema)
            row_groups += [RowGroup(file, i, footer.row_group(i).num_rows) for i in range(footer.num_row_groups)]
        rows = sum(group.rows for group in row_groups)
        if rows != schema.users:
            raise DataError(f"{path}: {len(files)} parts hold {rows} rows, schema.json says users={schema.users}")
        return cls(path, schema, row_groups, metadata)

    @property
    def row_counts(self) -> list[int]:
        """Rows of each row group, in file order."""
        return [group.rows for group in self.row_groups]

    @property
    def rows(self) -> int:
        return self.schema.users

    @property
    def bad_rows(self) -> int:
        """Distinct bad rows emptied so far by on_bad_row="skip"."""
        return sum(list(self._bad_rows.values()))  # reading threads may add to it meanwhile

    def history_columns(self) -> tuple[str, ...]:
        """The columns a sequence model reads: item_ids, and timestamps where the data has them."""
        return ("item_ids", "timestamps") if self.schema.timestamps else ("item_ids",)

    def read_row_group(
        self, index: int, columns: Sequence[str] | None = None, on_bad_row: Literal["fail", "skip"] = "fail"
    ) -> Histories:
        """Decode and check one row group.

        columns: names besides item_ids to read (None: `history_columns`). A bad row (null list, null element, item id
        outside [1, cardinality), other number of timestamps than items, time going back) raises DataError with file,
        row group, row, column and value; with on_bad_row="skip" it becomes an empty history and is counted.
        """
        group = self.row_groups[index]
        wanted = list(dict.fromkeys(["item_ids", *(self.history_columns() if columns is None else columns)]))
        unknown = [name for name in wanted if name not in expected_types(self.schema)]
        if unknown:
            raise DataError(
                f"{group.file}: has no column {unknown[0]}; it has {', '.join(expected_types(self.schema))}"
            )
        try:
            with pq.ParquetFile(group.file, metadata=self._metadata[group.file]) as file:
                table = file.read_row_group(group.index, columns=wanted, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{group}: cannot be decoded, the file is damaged or cut off: {error}") from error
        lists = {name: packed(table.column(name)) for name in wanted if pa.types.is_list(_type(table, name))}
        flat = {name: table.column(name) for name in wanted if name not in lists}
        faults = check_rows(lists, flat, self.schema)
        if faults and on_bad_row == "fail":
            raise DataError(_describe(group, min(faults, key=lambda fault: fault.row)))
        return self._histories(index, lists, flat, faults)

    def corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate item ids, int64 ascending, and their counts, int64, from items.parquet.

        Raises DataError if the file is missing or damaged, or ids are not ascending, unique and within [1,
        cardinality).
        """
        file = self.path / ITEMS_FILE
        if not file.exists():
            raise DataError(f"{file}: no such file; write the folder again with `gr prepare --force`")
        names = _read_footer(file).schema.to_arrow_schema().names
        for column in ("item_id", "count"):
            if column not in names:
                raise DataError(f"{file}: has no column {column}; it has {', '.join(names)}")
        try:
            table = pq.read_table(file, columns=["item_id", "count"])
            ids = table.column("item_id").cast(pa.int64()).to_numpy()
            counts = table.column("count").cast(pa.int64()).to_numpy()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: cannot be decoded: {error}") from error
        wrong = (ids < 1) | (ids >= self.schema.item_cardinality) | np.append(False, np.diff(ids) <= 0)
        if wrong.any() or len(ids) != self.schema.items:
            row = int(wrong.argmax()) if wrong.any() else len(ids)
            value = f"item_id={ids[row]}" if wrong.any() else "end of file"
            raise DataError(
                f"{file}: row {row}: {value}; wanted {self.schema.items} ascending ids, all "
                f"below {self.schema.item_cardinality}"
            )
        return ids, counts

    def _histories(
        self,
        index: int,
        lists: dict[str, tuple[np.ndarray, pa.Array, np.ndarray]],
        flat: dict[str, pa.ChunkedArray],
        faults: list[Fault],
    ) -> Histories:
        columns: dict[str, np.ndarray] = {}
        bad = np.zeros(self.row_groups[index].rows, dtype=bool)
        for fault in faults:
            bad[fault.rows] = True
        lengths = np.where(bad, 0, np.diff(lists["item_ids"][0]))
        for name, (offsets, values, _) in lists.items():
            array = values.fill_null(0).to_numpy(zero_copy_only=False)
            if bad.any():
                array = array[np.repeat(~bad, np.diff(offsets))]
            columns[name] = array.astype(np.float32 if name == "ratings" else np.int64, copy=False)
        for name, column in flat.items():
            columns[name] = column.fill_null(0).to_numpy()
        if faults:
            self._bad_rows[index] = int(bad.sum())
        return Histories(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), columns)


def _read_footer(file: Path) -> pq.FileMetaData:
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: is empty (0 bytes)")
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: is not a whole Parquet file, it is damaged or cut off: {error}") from error


def _type(table: pa.Table, name: str) -> pa.DataType:
    kind = table.schema.field(name).type
    return pa.list_(kind.value_type) if pa.types.is_large_list(kind) else kind


def _check_types(file: Path, found: pa.Schema, schema: DataSchema) -> None:
    for name, allowed in expected_types(schema).items():
        if name not in found.names:
            raise DataError(
                f"{file}: has no column {name}, which schema.json asks for; it has {', '.join(found.names)}"
            )
        kind = found.field(name).type
        if pa.types.is_large_list(kind):
            kind = pa.list_(kind.value_type)
        plain = pa.list_(kind.value_type) if pa.types.is_list(kind) else kind
        if plain not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise DataError(f"{file}: column {name} has type {found.field(name).type}, wanted {wanted}")


def _describe(group: RowGroup, fault: Fault) -> str:
    return (
        f"{group}, row {fault.row}, column {fault.column}: {fault.problem}; correct the row, or set "
        "data.on_bad_row=skip to count such rows and train on none of them"
    )

"""Dataset: a folder of user histories, read row group by row group. Every row is checked as it is read.

B rows (users), T events of those rows, packed row after row, oldest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.parquet import Parts, decoding, read_footer
from gr.data.validate import Fault, check_rows, expected_types, packed
from gr.data.vocabulary import check_vocabularies
from gr.errors import DataError
from gr.schema import ITEMS_FILE, USER_COLUMN, DataSchema


@dataclass(frozen=True)
class Histories:
    """The users of one row group.

    offsets: int64 [B + 1] into the packed columns. columns: packed arrays [T] by name (numbers float32, all else
    int64; timestamps in seconds whatever their unit on disk), and [B] for user_id and contextual columns.
    """

    offsets: np.ndarray
    columns: dict[str, np.ndarray]

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.offsets)


class Dataset:
    """A data folder: schema, row groups known from footers, and rows read on demand. Safe to read from threads."""

    def __init__(self, path: Path, schema: DataSchema, parts: Parts) -> None:
        self.path, self.schema, self.rows = path, schema, schema.users
        self.row_groups, self.row_counts = parts.row_groups, parts.row_counts
        self._parts = parts
        self._bad_rows: dict[int, int] = {}

    @classmethod
    def open(cls, path: Path | str) -> "Dataset":
        """Reads schema.json and the footers of the parts.

        Raises DataError, naming file and column, for a missing folder, schema or part, a file that is not Parquet or
        was cut off, a part without rows, a missing column, a wrong type, or fewer rows than the schema says.
        """
        path = Path(path)
        schema = DataSchema.load(path)
        return cls(path, schema, Parts.open(path, expected_types(schema), rows=("users", schema.users)))

    @property
    def bad_rows(self) -> int:
        """Distinct bad rows emptied so far by on_bad_row="skip"."""
        return sum(list(self._bad_rows.values()))  # reading threads may add to it meanwhile

    def read_row_group(
        self, index: int, columns: Sequence[str] | None = None, on_bad_row: Literal["fail", "skip"] = "fail"
    ) -> Histories:
        """Decodes and checks one row group.

        columns: names besides item_ids to read; None: timestamps, where the data has them. A bad row (null list, null
        element, item id outside [1, cardinality), other number of timestamps than items, time going back) raises
        DataError with file, row group, row, column and value; with on_bad_row="skip" it becomes an empty history and is
        counted.
        """
        file = self.row_groups[index].file
        columns = ["timestamps"] * self.schema.timestamps if columns is None else columns
        names = list(dict.fromkeys(["item_ids", *columns]))
        types = expected_types(self.schema)
        if unknown := [name for name in names if name not in types]:
            raise DataError(f"{file}: has no column {unknown[0]}; it has {', '.join(types)}")
        group, table = self._parts.read(index, names)
        lists = {name: packed(table.column(name)) for name in names if pa.types.is_list(types[name][0])}
        flat = {name: table.column(name) for name in names if name not in lists}
        faults = check_rows(lists, flat, self.schema)
        if faults and on_bad_row == "fail":
            fault = min(faults, key=lambda fault: fault.row)
            raise DataError(
                f"{group}, row {fault.row}, column {fault.column}: {fault.problem}; correct the row, or set "
                "data.on_bad_row=skip to count such rows and train on none of them"
            )
        return self._histories(index, lists, flat, faults)

    def user_ids(self) -> np.ndarray:
        """The user of every row, int64 [rows]."""
        read = (self._parts.read(index, [USER_COLUMN])[1].column(USER_COLUMN) for index in range(len(self.row_groups)))
        return np.concatenate([np.empty(0, dtype=np.int64), *(column.cast(pa.int64()).to_numpy() for column in read)])

    def rows_of(self, user_ids_N: np.ndarray) -> np.ndarray:
        """Rows of these users, int64, in file order; those of users that are not here are left out."""
        return np.flatnonzero(np.isin(self.user_ids(), user_ids_N))

    def corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate item ids and their counts, by read_corpus."""
        return read_corpus(self.path, self.schema)

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
            columns[name] = array.astype(np.float32 if pa.types.is_floating(values.type) else np.int64, copy=False)
        for name, column in flat.items():
            columns[name] = column.fill_null(0).to_numpy()
        if "timestamps" in columns and self.schema.time_unit == "ms":
            columns["timestamps"] = columns["timestamps"] // 1000
        if faults:
            self._bad_rows[index] = int(bad.sum())
        return Histories(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), columns)


def check_alike(schema: DataSchema, folder: Path, other: Dataset, fields: Sequence[str]) -> None:
    """Raises DataError where a model of data of `schema` cannot read `other`. fields: of schema.json, to compare."""
    check_vocabularies(schema.input_vocabularies, folder, other.schema.input_vocabularies, other.path)
    for name in fields:
        mine, others = getattr(schema, name), getattr(other.schema, name)
        if mine != others:
            shown = f": {mine} and {others}" if isinstance(mine, int) else ""
            raise DataError(f"{folder} and {other.path} differ in {name}{shown} (schema.json): prepare both alike")


def read_corpus(folder: Path, schema: DataSchema) -> tuple[np.ndarray, np.ndarray]:
    """Candidate item ids, int64 ascending, and their counts, int64, from items.parquet.

    Raises DataError if the file is missing or damaged, or ids are not ascending, unique and in [1, cardinality).
    """
    file = folder / ITEMS_FILE
    if not file.exists():
        raise DataError(f"{file}: no such file; write the folder again with `gr prepare --force`")
    names = read_footer(file).schema.to_arrow_schema().names
    for column in ("item_id", "count"):
        if column not in names:
            raise DataError(f"{file}: has no column {column}; it has {', '.join(names)}")
    with decoding(file):
        table = pq.read_table(file, columns=["item_id", "count"], page_checksum_verification=True)
        ids = table.column("item_id").cast(pa.int64()).to_numpy()
        counts = table.column("count").cast(pa.int64()).to_numpy()
    wrong = (ids < 1) | (ids >= schema.item_cardinality) | np.append(False, np.diff(ids) <= 0)
    if wrong.any() or len(ids) != schema.items:
        row = int(wrong.argmax()) if wrong.any() else len(ids)
        value = f"item_id={ids[row]}" if wrong.any() else "end of file"
        raise DataError(
            f"{file}: row {row}: {value}; wanted {schema.items} ascending ids, all below {schema.item_cardinality}"
        )
    return ids, counts

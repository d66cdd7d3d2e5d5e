"""TabularDataset: a tabular folder, read row group by row group. Every row is checked as it is read.

B rows, N dense columns, H ids of a row over all sparse columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr.data.columns import Column, ColumnType, read_column
from gr.data.parquet import Parts
from gr.data.validate import Fault, event_fault, row_fault, value_faults
from gr.data.vocabulary import check_vocabularies
from gr.errors import DataError
from gr.schema import SparseColumn, TabularSchema


@dataclass(frozen=True)
class TabularRows:
    """Rows as a model's pass reads them. labels_B, dense_BN: float32. ids_BH: the sparse columns side by side."""

    labels_B: np.ndarray
    dense_BN: np.ndarray
    ids_BH: np.ndarray


@dataclass(frozen=True)
class TabularColumns:
    """The columns of one row group, each as it was decoded: a batch copies its part of them, once.

    labels_B: float32. dense: float32 [B] each. ids: of each sparse column, [B], or [B, hots] of a column of lists;
    int32, or int64 where a table has more than 2^31 rows.
    """

    labels_B: np.ndarray
    dense: tuple[np.ndarray, ...]
    ids: tuple[np.ndarray, ...]

    @property
    def dense_BN(self) -> np.ndarray:
        """A copy with the columns side by side, float32."""
        return np.column_stack([np.empty((len(self.labels_B), 0), np.float32), *self.dense])

    @property
    def ids_BH(self) -> np.ndarray:
        """A copy with the columns side by side."""
        return np.column_stack([np.empty((len(self.labels_B), 0), np.int32), *self.ids])


class TabularDataset:
    """A tabular folder: schema, row groups known from footers, and rows read on demand. Safe to read from threads."""

    def __init__(self, path: Path, schema: TabularSchema, parts: Parts) -> None:
        self.path, self.schema, self.rows = path, schema, schema.rows
        self.row_groups, self.row_counts = parts.row_groups, parts.row_counts
        self._parts, self._types = parts, _types(schema)

    @classmethod
    def open(cls, path: Path | str, columns: TabularSchema | None = None) -> "TabularDataset":
        """Reads schema.json and the footers of the parts. columns: schema.json with the columns to read; None: all.

        Raises DataError, naming file and column, for a missing folder, schema or part, a file that is not Parquet or
        was cut off, a missing column, a type that cannot be read, or another number of rows than the schema says.
        """
        dataset = cls.of_any_size(path, columns)
        for problem in dataset.wrong_totals():
            raise DataError(problem)
        return dataset

    @classmethod
    def of_any_size(cls, path: Path | str, columns: TabularSchema | None = None) -> "TabularDataset":
        """Opens it as `open` does, but does not check the number of rows."""
        path = Path(path)
        schema = TabularSchema.load(path)
        return cls(path, columns or schema, Parts.open(path, _types(schema)))

    def wrong_totals(self) -> Iterator[str]:
        """The contradiction of footers to schema.json: another number of rows."""
        yield from self._parts.wrong_rows(self.path, "rows", self.schema.rows)

    def read_row_group(self, index: int) -> TabularColumns:
        """Decodes and checks one row group. A null dense value is 0, a null id is 0.

        Raises DataError with file, row group, row, column and value for a label that is not 0 or 1, a dense value that
        is not finite, an id outside [0, cardinality), a value that no cast keeps, or a list of another number of ids
        than the schema's hots.
        """
        columns = self.read_columns(index)
        if faults := self.faults(columns):
            fault = min(faults, key=lambda fault: fault.row)
            raise DataError(
                f"{self.row_groups[index]}, row {fault.row}, column {fault.column}: {fault.problem}; correct the value "
                "where the folder is written"
            )
        schema = self.schema
        dtype = np.int32 if all(column.cardinality <= 1 << 31 for column in schema.sparse) else np.int64
        return TabularColumns(
            labels_B=columns[schema.labels[0]].filled.astype(np.float32),
            dense=tuple(columns[name].filled for name in schema.dense),
            ids=tuple(_ids(columns[column.name], column).astype(dtype, copy=False) for column in schema.sparse),
        )

    def read_columns(self, index: int) -> dict[str, Column]:
        """The columns of one row group, not yet checked."""
        _, table = self._parts.read(index, list(self._types))
        return {name: read_column(table.column(name), column_type) for name, column_type in self._types.items()}

    def faults(self, columns: dict[str, Column]) -> list[Fault]:
        """The faults of a row group, in no order; empty when all rows are good."""
        schema, types, label = self.schema, self._types, self.schema.labels[0]
        faults = [
            fault
            for name, column in columns.items()
            for fault in value_faults(name, column, types[name], nulls=name == label)
        ]
        labels_B = columns[label].filled
        wrong_B = (labels_B != 0) & (labels_B != 1)
        faults.append(
            row_fault(label, "is not 0 or 1", wrong_B, lambda row: f"is {labels_B[row]}, allowed are 0 and 1")
        )
        for sparse in schema.sparse:
            faults += _id_faults(columns[sparse.name], sparse)
        return [fault for fault in faults if fault is not None]


def _id_faults(column: Column, sparse: SparseColumn) -> list[Fault | None]:
    ids = column.filled
    faults: list[Fault | None] = []
    if len(ids) and not 0 <= ids.min() <= ids.max() < sparse.cardinality:
        outside = (ids < 0) | (ids >= sparse.cardinality)
        describe = f"allowed are 0 to {sparse.cardinality - 1}"
        faults.append(
            event_fault(
                sparse.name, "is out of range", column, outside, lambda place: f"is id {ids[place]}, {describe}"
            )
        )
    if column.offsets is not None:
        counts_B = np.diff(column.offsets)
        wrong_B = (counts_B != sparse.hots) & ~column.nulls
        faults.append(
            row_fault(
                sparse.name,
                "has another length",
                wrong_B,
                lambda row: f"holds {counts_B[row]} ids, wanted {sparse.hots}",
            )
        )
    return faults


def _ids(column: Column, sparse: SparseColumn) -> np.ndarray:
    """The ids of a sparse column without faults, [B], or [B, hots] of lists; a null row has zeros."""
    if column.offsets is None:
        return column.filled
    ids = np.zeros((len(column.nulls), sparse.hots), dtype=np.int64 if sparse.cardinality > 1 << 31 else np.int32)
    ids[~column.nulls] = column.filled.reshape(-1, sparse.hots)
    return ids


def _types(schema: TabularSchema) -> dict[str, ColumnType]:
    types = dict.fromkeys(schema.labels, ColumnType("label")) | dict.fromkeys(schema.dense, ColumnType("number"))
    return types | {column.name: ColumnType("id", column.hots > 1) for column in schema.sparse}


def check_rows_alike(schema: TabularSchema, folder: Path, other: TabularSchema, path: Path) -> None:
    """Raises DataError where a model of rows of `schema` cannot read those of `other`, which lie in `path`."""
    check_vocabularies(schema.input_vocabularies, folder, other.input_vocabularies, path)
    for name in ("labels", "dense", "transform", "sparse"):
        if getattr(schema, name) != getattr(other, name):
            raise DataError(
                f"{folder} and {path} differ in {name} (schema.json): prepare both with "
                "the same columns, transform and vocabulary (as `gr prepare criteo --vocabulary` does)"
            )

"""Reads a tabular folder row group by row group, and checks every row as it is read.

B rows, N dense columns, H ids of a row over all sparse columns.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr.data.parquet import Parts, RowGroup, existing_folder
from gr.data.validate import packed
from gr.errors import DataError
from gr.schema import TabularSchema


@dataclass(frozen=True)
class TabularRows:
    """Rows of one row group. labels_B: float32. dense_BN: float32. ids_BH: int32, the sparse columns side by side."""

    labels_B: np.ndarray
    dense_BN: np.ndarray
    ids_BH: np.ndarray


class TabularDataset:
    """A tabular folder: schema, row groups known from footers, and rows read on demand. Safe to read from threads."""

    def __init__(self, path: Path, schema: TabularSchema, parts: Parts) -> None:
        self.path, self.schema, self.row_groups = path, schema, parts.row_groups
        self._parts = parts

    @classmethod
    def open(cls, path: Path | str) -> "TabularDataset":
        """Read schema.json and the footers of the parts.

        Raises DataError, naming file and column, for a missing folder, schema or part, a file that is not Parquet or
        was cut off, a part without rows, a missing or unknown column, a wrong type, or another number of rows than the
        schema says.
        """
        path = existing_folder(path)
        schema = TabularSchema.load(path)
        types = _types(schema)
        parts = Parts.open(path, types, rows=("rows", schema.rows))
        for file, footer in parts.metadata.items():
            if unknown := [name for name in footer.schema.to_arrow_schema().names if name not in types]:
                raise DataError(f"{file}: column {unknown[0]} is not in schema.json; write the folder again")
        return cls(path, schema, parts)

    @property
    def rows(self) -> int:
        return self.schema.rows

    @property
    def row_counts(self) -> list[int]:
        """Rows of each row group, in file order."""
        return [group.rows for group in self.row_groups]

    def read_row_group(self, index: int) -> TabularRows:
        """Decode and check one row group. A null dense value is 0, a null id is 0.

        DataError with file, row group, row, column and value for a label that is null or not finite, a dense value that
        is not finite, an id outside [0, cardinality), or a list of another number of ids than the schema's hots.
        """
        schema = self.schema
        names = [*schema.labels, *schema.dense, *(column.name for column in schema.sparse)]
        group, table = self._parts.read(index, names)
        label = table.column(schema.labels[0])
        if label.null_count:
            raise _fault(group, schema.labels[0], label.is_null().to_numpy(), "is null")
        labels_B = label.to_numpy()
        if (wrong := (labels_B != 0) & (labels_B != 1)).any():
            raise _fault(group, schema.labels[0], wrong, f"is {labels_B[wrong][0]}, allowed are 0 and 1")
        dense_BN = np.empty((group.rows, len(schema.dense)), dtype=np.float32)
        for place, name in enumerate(schema.dense):
            dense_BN[:, place] = _finite(group, name, table.column(name).fill_null(0).to_numpy())
        ids_BH = np.empty((group.rows, sum(column.hots for column in schema.sparse)), dtype=np.int32)
        place = 0
        for column in schema.sparse:
            ids = _ids(group, column.name, table.column(column.name), column.hots)
            outside = (ids < 0) | (ids >= column.cardinality)
            rows: np.ndarray = np.any(outside, axis=1)
            if rows.any():
                problem = f"is id {ids[outside][0]}, allowed are 0 to {column.cardinality - 1}"
                raise _fault(group, column.name, rows, problem)
            ids_BH[:, place : place + column.hots] = ids
            place += column.hots
        labels_B = _finite(group, schema.labels[0], label.to_numpy().astype(np.float32))
        return TabularRows(labels_B, dense_BN, ids_BH)


def _finite(group: RowGroup, name: str, values_B: np.ndarray) -> np.ndarray:
    wrong = ~np.isfinite(values_B)
    if wrong.any():
        raise _fault(group, name, wrong, f"is {values_B[wrong][0]}, wanted a finite number")
    return values_B


def _ids(group: RowGroup, name: str, column: pa.ChunkedArray, hots: int) -> np.ndarray:
    """int32 [B, hots]."""
    if hots == 1:
        return column.fill_null(0).to_numpy()[:, None]
    offsets, values, nulls = packed(column)
    wrong = (np.diff(offsets) != hots) & ~nulls
    if wrong.any():
        raise _fault(group, name, wrong, f"holds {np.diff(offsets)[wrong][0]} ids, wanted {hots}")
    ids = np.zeros((len(nulls), hots), dtype=np.int32)
    ids[~nulls] = values.fill_null(0).to_numpy(zero_copy_only=False).reshape(-1, hots)
    return ids


def _fault(group: RowGroup, column: str, rows: np.ndarray, problem: str) -> DataError:
    return DataError(
        f"{group}, row {int(rows.argmax())}, column {column}: {problem}; write the folder again with `gr prepare "
        "--force`"
    )


def _types(schema: TabularSchema) -> dict[str, tuple[pa.DataType, ...]]:
    types: dict[str, tuple[pa.DataType, ...]] = {name: (pa.int8(), pa.float32()) for name in schema.labels}
    types |= {name: (pa.float32(),) for name in schema.dense}
    return types | {c.name: (pa.int32() if c.hots == 1 else pa.list_(pa.int32()),) for c in schema.sparse}

"""TabularDataset: a tabular folder, read row group by row group. Every row is checked as it is read.

B rows, N dense columns, H ids of a row over all sparse columns.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr.data.parquet import Parts, RowGroup
from gr.data.validate import packed
from gr.errors import DataError
from gr.schema import SparseColumn, TabularSchema


@dataclass(frozen=True)
class TabularRows:
    """Rows of one row group. labels_B: float32. dense_BN: float32. ids_BH: int32, the sparse columns side by side."""

    labels_B: np.ndarray
    dense_BN: np.ndarray
    ids_BH: np.ndarray


class TabularDataset:
    """A tabular folder: schema, row groups known from footers, and rows read on demand. Safe to read from threads."""

    def __init__(self, path: Path, schema: TabularSchema, parts: Parts) -> None:
        self.path, self.schema, self.rows = path, schema, schema.rows
        self.row_groups, self.row_counts = parts.row_groups, parts.row_counts
        self._parts = parts

    @classmethod
    def open(cls, path: Path | str, columns: TabularSchema | None = None) -> "TabularDataset":
        """Reads schema.json and the footers of the parts. columns: schema.json with the columns to read; None: all.

        Raises DataError, naming file and column, for a missing folder, schema or part, a file that is not Parquet or
        was cut off, a part without rows, a missing or unknown column, a wrong type, or another number of rows than the
        schema says.
        """
        path = Path(path)
        schema = TabularSchema.load(path)
        types = _types(schema)
        parts = Parts.open(path, types, rows=("rows", schema.rows))
        for file, footer in parts.metadata.items():
            if unknown := [name for name in footer.schema.to_arrow_schema().names if name not in types]:
                raise DataError(f"{file}: column {unknown[0]} is not in schema.json; write the folder again")
        return cls(path, columns or schema, parts)

    def read_row_group(self, index: int) -> TabularRows:
        """Decodes and checks one row group. A null dense value is 0, a null id is 0.

        Raises DataError with file, row group, row, column and value for a label that is not 0 or 1, a dense value that
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
            dense_BN[:, place] = values_B = table.column(name).fill_null(0).to_numpy()
            if (wrong := ~np.isfinite(values_B)).any():
                raise _fault(group, name, wrong, f"is {values_B[wrong][0]}, wanted a finite number")
        ids = [_ids(group, column, table.column(column.name)) for column in schema.sparse]
        ids_BH = np.concatenate([np.empty((group.rows, 0), dtype=np.int32), *ids], axis=1)
        return TabularRows(labels_B.astype(np.float32), dense_BN, ids_BH)


def _ids(group: RowGroup, column: SparseColumn, array: pa.ChunkedArray) -> np.ndarray:
    """The ids of a sparse column, int32 [B, hots]; a null row has zeros."""
    if column.hots == 1:
        ids = array.fill_null(0).to_numpy()[:, None]
    else:
        offsets, values, nulls = packed(array)
        if (wrong := (np.diff(offsets) != column.hots) & ~nulls).any():
            raise _fault(group, column.name, wrong, f"holds {np.diff(offsets)[wrong][0]} ids, wanted {column.hots}")
        ids = np.zeros((len(nulls), column.hots), dtype=np.int32)
        ids[~nulls] = values.fill_null(0).to_numpy(zero_copy_only=False).reshape(-1, column.hots)
    if (outside := (ids < 0) | (ids >= column.cardinality)).any():
        problem = f"is id {ids[outside][0]}, allowed are 0 to {column.cardinality - 1}"
        raise _fault(group, column.name, np.any(outside, axis=1), problem)
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

"""Rows in a log's own values -> what a click model reads, as numpy arrays. B rows, H ids of a row. No torch.

Training's folders, `gr predict`, gr.load and a served package all read a user's columns through this one definition.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from gr.data.columns import ColumnType, flattened, is_list
from gr.data.tabular import TabularRows
from gr.data.validate import checked_column, require_columns
from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from gr.schema import SparseColumn, TabularSchema


class ColumnError(DataError):
    """A column of a table is missing, or has a value that a model cannot read. column: its name."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


@contextmanager
def _reading(column: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise ColumnError(column, str(error)) from None


class ClickRows:
    """Reads tables that have the columns of a tabular folder.

    Dense columns are as in the folder's Parquet files; a sparse column has values where the schema has a vocabulary of
    it, ids elsewhere. A null, and a value that training did not see, is 0.
    """

    def __init__(self, schema: TabularSchema, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.schema, self.vocabularies = schema, vocabularies
        self._limits_H = np.repeat([c.cardinality for c in schema.sparse], [c.hots for c in schema.sparse])

    def read(self, table: pa.Table, where: str = "the input") -> tuple[TabularRows, dict[str, int]]:
        """The rows, with labels 0, and how many values of a column training did not see, where there are any.

        where: of the table, for messages. Raises ColumnError for a missing column, or a value that is no finite number
        or no id.
        """
        for name in [*self.schema.dense, *(column.name for column in self.schema.sparse)]:
            with _reading(name):
                require_columns(where, table, [name])
        dense_BN = np.empty((table.num_rows, len(self.schema.dense)), dtype=np.float32)
        for place, name in enumerate(self.schema.dense):
            with _reading(name):
                dense_BN[:, place] = checked_column(where, table, name, ColumnType("number"), nulls=False).filled
        ids_BH = np.empty((table.num_rows, sum(column.hots for column in self.schema.sparse)), dtype=np.int64)
        unseen: dict[str, int] = {}
        first = 0
        for column in self.schema.sparse:
            with _reading(column.name):
                ids, count = self._ids(where, column, table.column(column.name))
            ids_BH[:, first : first + column.hots] = ids.reshape(-1, column.hots)
            first += column.hots
            if count:
                unseen[column.name] = count
        return TabularRows(np.zeros(table.num_rows, dtype=np.float32), dense_BN, ids_BH), unseen

    def read_plain(self, columns: Mapping[str, np.ndarray]) -> tuple[TabularRows, dict[str, int]] | None:
        """The result of `read` for columns of plain numbers, [B] or [B, hots], without a fault; None for any others.

        A small request spends most of its time in Arrow, so a server tries this first.
        """
        names = [column.name for column in self.schema.sparse]
        if any(columns[name].dtype.kind not in "fiu" for name in self.schema.dense):
            return None
        if any(columns[name].dtype.kind != "i" or not self.vocabularies[name].has_numbers for name in names):
            return None
        rows = len(columns[names[0]])
        dense_BN = np.empty((rows, len(self.schema.dense)), dtype=np.float32)
        ids_BH = np.empty((rows, len(self._limits_H)), dtype=np.int64)
        unseen: dict[str, int] = {}
        with np.errstate(over="ignore"):
            for place, name in enumerate(self.schema.dense):
                dense_BN[:, place] = columns[name]
        first = 0
        for column in self.schema.sparse:
            ids, count = self.vocabularies[column.name].ids_of_numbers(columns[column.name])
            ids_BH[:, first : first + column.hots] = ids.reshape(rows, column.hots)
            first += column.hots
            if count:
                unseen[column.name] = count
        if not np.isfinite(dense_BN).all() or ((ids_BH < 0) | (ids_BH >= self._limits_H)).any():
            return None
        return TabularRows(np.zeros(rows, dtype=np.float32), dense_BN, ids_BH), unseen

    def _ids(self, where: str, column: SparseColumn, values_B: pa.ChunkedArray) -> tuple[np.ndarray, int]:
        """The ids of a column, int64 [B * hots], and the number of values that training did not see."""
        if column.hots == 1:
            values = values_B.combine_chunks()
        else:
            if not is_list(values_B.type):
                raise DataError(
                    f"{where}: column {column.name} has type {values_B.type}, wanted lists of {column.hots} ids"
                )
            offsets, values = flattened(values_B.combine_chunks())
            if (wrong_B := np.diff(offsets) != column.hots).any():
                row = int(wrong_B.argmax())
                raise DataError(
                    f"{where}: row {row}, column {column.name}: holds {offsets[row + 1] - offsets[row]} ids, wanted "
                    f"{column.hots}"
                )
        ids, known = self.vocabularies[column.name].lookup(values)
        ids = np.where(known, ids, 0)
        if (outside := (ids < 0) | (ids >= column.cardinality)).any():
            row = int(outside.argmax()) // column.hots
            raise DataError(
                f"{where}: row {row}, column {column.name}: is id {ids[outside][0]}, allowed are 0 to "
                f"{column.cardinality - 1}"
            )
        return ids, len(known) - int(known.sum()) - values.null_count

"""Rows in a log's own values -> batches for a click model. B rows."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import TabularBatch
from gr.data.columns import ColumnType, flattened, is_list
from gr.data.validate import checked_column, require_columns
from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from gr.schema import SparseColumn, TabularSchema


class ClickRows:
    """Makes batches of tables that have the columns of a tabular folder.

    Dense columns are as in the folder's Parquet files; a sparse column has values where the schema has a vocabulary of
    it, ids elsewhere. A null, and a value that training did not see, is 0.
    """

    def __init__(self, schema: TabularSchema, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.schema, self.vocabularies = schema, vocabularies

    def batch(self, table: pa.Table, where: str = "the input") -> TabularBatch:
        """Labels are 0. where: of the table, for messages.

        Raises DataError for a missing column, or a value that is no finite number or no id.
        """
        require_columns(where, table, [*self.schema.dense, *(column.name for column in self.schema.sparse)])
        dense_BN = np.empty((table.num_rows, len(self.schema.dense)), dtype=np.float32)
        for place, name in enumerate(self.schema.dense):
            dense_BN[:, place] = checked_column(where, table, name, ColumnType("number"), nulls=False).filled
        ids = [self._ids(where, column, table.column(column.name)) for column in self.schema.sparse]
        return TabularBatch(
            dense_BN=torch.from_numpy(dense_BN),
            sparse=KeyedJaggedTensor(
                keys=[column.name for column in self.schema.sparse],
                values=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *ids])),
                lengths=torch.from_numpy(np.repeat([column.hots for column in self.schema.sparse], table.num_rows)),
                stride=table.num_rows,
            ),
            labels_B=torch.zeros(table.num_rows),
            first_example=0,
        )

    def _ids(self, where: str, column: SparseColumn, values_B: pa.ChunkedArray) -> np.ndarray:
        """int64 [B * hots]."""
        if column.hots == 1:
            ids = self.vocabularies[column.name].ids(values_B)
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
            ids = self.vocabularies[column.name].ids(values)
        if (outside := (ids < 0) | (ids >= column.cardinality)).any():
            row = int(outside.argmax()) // column.hots
            raise DataError(
                f"{where}: row {row}, column {column.name}: is id {ids[outside][0]}, allowed are 0 to "
                f"{column.cardinality - 1}"
            )
        return ids

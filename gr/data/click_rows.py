"""Rows in a log's own values -> batches for a click model. B rows."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import TabularBatch
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

    def batch(self, table: pa.Table, first_row: int = 0) -> TabularBatch:
        """Labels are 0. first_row: number of the table's first row, for errors.

        Raises DataError for a missing column, or a value that is no finite number or no id.
        """
        for name in [*self.schema.dense, *(column.name for column in self.schema.sparse)]:
            if name not in table.column_names:
                raise DataError(
                    f"column {name} is missing, the model reads it; there are {', '.join(table.column_names)}"
                )
        dense_BN = np.empty((table.num_rows, len(self.schema.dense)), dtype=np.float32)
        for place, name in enumerate(self.schema.dense):
            dense_BN[:, place] = _numbers(name, table.column(name), first_row)
        ids = [self._ids(column, table.column(column.name), first_row) for column in self.schema.sparse]
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

    def _ids(self, column: SparseColumn, values_B: pa.ChunkedArray, first_row: int) -> np.ndarray:
        """int64 [B * hots]."""
        if column.hots == 1:
            ids = self.vocabularies[column.name].ids(values_B)
        else:
            lists = values_B.combine_chunks()
            if not pa.types.is_list(lists.type) and not pa.types.is_large_list(lists.type):
                raise DataError(f"column {column.name}: of type {lists.type}, wanted lists of {column.hots} ids")
            widths = set(lists.value_lengths().to_pylist())
            if widths - {column.hots}:
                raise DataError(
                    f"column {column.name}: has lists of {sorted(map(str, widths))} ids, wanted {column.hots}"
                )
            ids = self.vocabularies[column.name].ids(lists.flatten())
        if (outside := (ids < 0) | (ids >= column.cardinality)).any():
            row = first_row + int(outside.argmax()) // column.hots
            raise DataError(
                f"row {row}, column {column.name}: is id {ids[outside][0]}, allowed are 0 to {column.cardinality - 1}"
            )
        return ids


def _numbers(name: str, values_B: pa.ChunkedArray, first_row: int) -> np.ndarray:
    try:
        numbers = values_B.cast(pa.float64()).fill_null(0).to_numpy()
    except pa.ArrowException as error:
        raise DataError(f"column {name}: of type {values_B.type}, wanted numbers ({error})") from None
    with np.errstate(over="ignore"):
        single_B = numbers.astype(np.float32)
    if (wrong := ~np.isfinite(single_B)).any():
        row = first_row + int(wrong.argmax())
        raise DataError(f"row {row}, column {name}: is {numbers[wrong][0]}, wanted a finite number")
    return single_B

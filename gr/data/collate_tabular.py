"""Rows of a tabular folder, or of a user's table -> batches for a click model. B rows, F sparse columns."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import TabularBatch
from gr.data.tabular import TabularColumns, TabularRows
from gr.schema import TabularSchema


def tabular_batch(rows: TabularRows, schema: TabularSchema, first_example: int = 0) -> TabularBatch:
    """The rows as one batch. first_example: index, in the order of the pass, of the global batch's first example."""
    hots = [column.hots for column in schema.sparse]
    columns = [ids.reshape(-1) for ids in np.split(rows.ids_BH, np.cumsum(hots)[:-1], axis=1)]
    values = torch.from_numpy(np.concatenate(columns).astype(np.int64, copy=False))
    return TabularBatch(
        dense_BN=torch.from_numpy(rows.dense_BN),
        sparse=_sparse(values, schema, len(rows.labels_B)),
        labels_B=torch.from_numpy(rows.labels_B),
        first_example=first_example,
    )


def batch_of_places(
    groups: Sequence[TabularColumns], places: tuple[np.ndarray, np.ndarray], schema: TabularSchema, first_example: int
) -> TabularBatch:
    """The batch of rows at places = (index of a group, row in it), int64 [B] each. first_example: of tabular_batch.

    Rows that stand side by side in a group are copied as a block; the others are gathered column by column.
    """
    group_B, row_B = places
    size = len(row_B)
    labels_B = np.empty(size, dtype=np.float32)
    dense_BN = np.empty((size, len(schema.dense)), dtype=np.float32)
    values = np.empty(size * sum(column.hots for column in schema.sparse), dtype=np.int64)
    ids, first = [], 0
    for column in schema.sparse:
        part = values[first : first + size * column.hots]
        ids.append(part if column.hots == 1 else part.reshape(size, column.hots))
        first += len(part)
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(group_B)) + 1).tolist(), size] if size else []):
        group, rows = groups[group_B[start]], _as_slice(row_B[start:stop])
        labels_B[start:stop] = group.labels_B[rows]
        for place, column_B in enumerate(group.dense):
            dense_BN[start:stop, place] = column_B[rows]
        for batch_ids, group_ids in zip(ids, group.ids, strict=True):
            batch_ids[start:stop] = group_ids[rows]
    return TabularBatch(
        dense_BN=torch.from_numpy(dense_BN),
        sparse=_sparse(torch.from_numpy(values), schema, size),
        labels_B=torch.from_numpy(labels_B),
        first_example=first_example,
    )


def _as_slice(row_B: np.ndarray) -> np.ndarray | slice:
    """The same rows, as a slice where they follow one another."""
    first = int(row_B[0])
    return slice(first, first + len(row_B)) if (np.diff(row_B) == 1).all() else row_B


def _sparse(values: Tensor, schema: TabularSchema, size: int) -> KeyedJaggedTensor:
    """values: int64, the ids of one column after the other."""
    hots = np.array([column.hots for column in schema.sparse], dtype=np.int64)
    return KeyedJaggedTensor(
        keys=[column.name for column in schema.sparse],
        values=values,
        lengths=torch.from_numpy(np.repeat(hots, size)),
        stride=size,
    )

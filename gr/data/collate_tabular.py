"""Rows of a tabular folder, or of a user's table -> batches for a click model. B rows."""

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.batch import TabularBatch
from gr.data.tabular import TabularRows
from gr.schema import TabularSchema


def tabular_batch(rows: TabularRows, schema: TabularSchema, first_example: int = 0) -> TabularBatch:
    """The rows as one batch. first_example: index, in the order of the pass, of the global batch's first example."""
    size, hots = len(rows.labels_B), [column.hots for column in schema.sparse]
    columns = [ids.reshape(-1) for ids in np.split(rows.ids_BH, np.cumsum(hots)[:-1], axis=1)]
    return TabularBatch(
        dense_BN=torch.from_numpy(rows.dense_BN),
        sparse=KeyedJaggedTensor(
            keys=[column.name for column in schema.sparse],
            values=torch.from_numpy(np.concatenate(columns).astype(np.int64, copy=False)),
            lengths=torch.from_numpy(np.repeat(np.asarray(hots, dtype=np.int64), size)),
            stride=size,
        ),
        labels_B=torch.from_numpy(rows.labels_B),
        first_example=first_example,
    )

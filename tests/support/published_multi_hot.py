"""The multi-hot tables of MLPerf's DLRM-v2 data by the recipe as it is published."""

import numpy as np


def published_tables(cardinalities: tuple[int, ...], hots: tuple[int, ...]) -> list[np.ndarray]:
    """One table a column, int64 [cardinality, hots]. Seeds numpy's global stream, as the recipe does."""
    np.random.seed(0)
    tables = []
    for n, h in zip(cardinalities, hots, strict=True):
        ids = np.arange(n)[:, np.newaxis]
        tables.append(np.concatenate((ids, np.random.randint(0, n, size=(n, h - 1))), axis=-1))
    return tables

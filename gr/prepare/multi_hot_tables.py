"""Several ids from each id, as MLPerf's DLRM-v2 data has them: id k becomes row k of a fixed random table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gr.errors import ConfigError

MLPERF_HOTS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
_DRAWS_AT_ONCE = 1 << 22  # bounds the int64 numbers in memory; the stream does not depend on it


def multi_hot_tables(cardinalities: Sequence[int], hots: Sequence[int], folder: Path | None = None) -> list[np.ndarray]:
    """One table a column, int32 [cardinality, hots]: row k is k itself, then hots - 1 ids uniform in [0, cardinality).

    The numbers are those of numpy's legacy stream after `numpy.random.seed(0)`, drawn column after column as int64, so
    the tables depend on every column before them. 4 bytes an element: in memory, or in files in `folder`, mapped.
    Raises ConfigError for another number of hots than of columns, or one below 1.
    Source: facebookresearch/dlrm, torchrec_dlrm/multi_hot.py, the uniform distribution.
    """
    if len(cardinalities) != len(hots) or min([*cardinalities, *hots], default=1) < 1:
        raise ConfigError(
            f"multi-hot sizes {list(hots)} for {len(cardinalities)} columns; give one of at least 1 a column (--hots)"
        )
    legacy = np.random.RandomState(0)
    tables = []
    for number, (rows, width) in enumerate(zip(cardinalities, hots, strict=True)):
        table = _table(rows, width, None if folder is None else folder / f"{number}.npy")
        table[:, 0] = np.arange(rows)
        step = max(1, _DRAWS_AT_ONCE // width)
        for start in range(0, rows if width > 1 else 0, step):
            stop = min(start + step, rows)
            table[start:stop, 1:] = legacy.randint(0, rows, size=(stop - start, width - 1))
        tables.append(table)
    return tables


def _table(rows: int, width: int, file: Path | None) -> np.ndarray:
    if file is None:
        return np.empty((rows, width), dtype=np.int32)
    return np.lib.format.open_memmap(file, mode="w+", dtype=np.int32, shape=(rows, width))

"""A tabular folder of one id a column -> one of several, as MLPerf's DLRM-v2 data has them: id k becomes row k of a
fixed random table.

The tables of ids are files beside the result while it is written, 4 bytes an element: 24 GB for MLPerf's. Memory holds
a row group, 14 MB of ids, and what the system caches of the tables.

B rows of a row group.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gr.data.tabular import TabularDataset
from gr.errors import ConfigError
from gr.prepare.tabular import column_names, tabular_table
from gr.prepare.write import PartWriter
from gr.schema import VOCABULARY_FOLDER, SparseColumn, TabularSchema

MLPERF_HOTS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
_DRAWS_AT_ONCE = 1 << 22  # bounds the int64 numbers in memory; the stream does not depend on it


def prepare_multi_hot(source: Path, folder: Path, hots: Sequence[int] | None) -> TabularSchema:
    """Write the rows of the tabular folder `source` into an empty folder, with hots[c] ids in sparse column c.
    hots: None is MLPERF_HOTS.

    The first id of a row is the source's. Train and test of one vocabulary get ids of the same tables. Raises
    ConfigError where hots are not one a column, or a column has several ids already; DataError for bad rows.
    """
    hots = hots or MLPERF_HOTS
    data = TabularDataset.open(source)
    schema = data.schema
    if wide := [column.name for column in schema.sparse if column.hots > 1]:
        raise ConfigError(f"{source}: column {wide[0]} has several ids a row already; give a folder with one")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tables.", dir=folder.parent) as place:
        tables = multi_hot_tables([column.cardinality for column in schema.sparse], hots, Path(place))
        _write(data, folder, tables)
    if (source / VOCABULARY_FOLDER).is_dir():
        shutil.copytree(source / VOCABULARY_FOLDER, folder / VOCABULARY_FOLDER)
    columns = [
        SparseColumn(name=column.name, cardinality=column.cardinality, hots=hot)
        for column, hot in zip(schema.sparse, hots, strict=True)
    ]
    written = schema.model_copy(update={"sparse": columns, "source": f"{schema.source}; multi-hot of {source}"})
    written.save(folder)
    return written


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
        if folder is None:
            table = np.empty((rows, width), dtype=np.int32)
        else:
            table = np.lib.format.open_memmap(folder / f"{number}.npy", mode="w+", dtype=np.int32, shape=(rows, width))
        table[:, 0] = np.arange(rows)
        step = max(1, _DRAWS_AT_ONCE // width)
        for start in range(0, rows if width > 1 else 0, step):
            stop = min(start + step, rows)
            table[start:stop, 1:] = legacy.randint(0, rows, size=(stop - start, width - 1))
        tables.append(table)
    return tables


def _write(data: TabularDataset, folder: Path, tables: Sequence[np.ndarray]) -> None:
    """Parts and row groups as in the source."""
    writer = PartWriter(folder, max(data.row_counts))
    with tqdm(total=data.rows, unit="row", unit_scale=True, desc="multi-hot", disable=None) as bar:
        for index, group in enumerate(data.row_groups):
            if index and group.file != data.row_groups[index - 1].file:
                writer.end_part()
            rows = data.read_row_group(index)
            ids = [table[ids_B] for ids_B, table in zip(rows.ids_BH.T, tables, strict=True)]
            writer.write(tabular_table(column_names(data.schema), rows.labels_B, rows.dense_BN.T, ids))
            writer.end_group()
            bar.update(group.rows)
    writer.end_part()

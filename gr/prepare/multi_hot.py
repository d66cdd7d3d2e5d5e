"""A tabular folder of one id a column -> one of several, as MLPerf's DLRM-v2 data has them (gr/prepare/multi_hot_tables.py).

The tables of ids are files beside the result while it is written, 4 bytes an element: 24 GB for MLPerf's. Memory holds
a row group, 14 MB of ids, and what the system caches of the tables.

B rows of a row group.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gr.data.tabular import TabularDataset
from gr.errors import ConfigError
from gr.prepare.multi_hot_tables import multi_hot_tables
from gr.schema import VOCABULARY_FOLDER, SparseColumn, TabularSchema


def prepare_multi_hot(source: Path, folder: Path, hots: Sequence[int]) -> TabularSchema:
    """Write the rows of the tabular folder `source` into an empty folder, with hots[c] ids in sparse column c.

    The first id of a row is the source's. Train and test of one vocabulary get ids of the same tables. Raises
    ConfigError where hots are not one a column, or a column has several ids already; DataError for bad rows.
    """
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


def _write(data: TabularDataset, folder: Path, tables: Sequence[np.ndarray]) -> None:
    """Parts and row groups as in the source."""
    writer: pq.ParquetWriter | None = None
    part: Path | None = None
    with tqdm(total=data.rows, unit="rows", unit_scale=True, desc="multi-hot", disable=None) as bar:
        for index, group in enumerate(data.row_groups):
            table = _expanded(data, index, tables)
            if group.file != part:
                if writer is not None:
                    writer.close()
                part = group.file
                writer = pq.ParquetWriter(folder / part.name, table.schema, compression="zstd")
            assert writer is not None
            writer.write_table(table, row_group_size=table.num_rows)
            bar.update(table.num_rows)
    if writer is not None:
        writer.close()


def _expanded(data: TabularDataset, index: int, tables: Sequence[np.ndarray]) -> pa.Table:
    rows, schema = data.read_row_group(index), data.schema
    arrays = {schema.labels[0]: pa.array(rows.labels_B)}
    arrays |= {name: pa.array(column_B) for name, column_B in zip(schema.dense, rows.dense_BN.T, strict=True)}
    for column, ids_B, table in zip(schema.sparse, rows.ids_BH.T, tables, strict=True):
        width = table.shape[1]
        if width == 1:
            arrays[column.name] = pa.array(ids_B)
            continue
        offsets = pa.array(np.arange(len(ids_B) + 1, dtype=np.int32) * np.int32(width))
        arrays[column.name] = pa.ListArray.from_arrays(offsets, pa.array(table[ids_B].reshape(-1)))
    return pa.table(arrays)

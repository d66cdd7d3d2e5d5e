"""Tabular folders as written: tables of a label, dense features and ids, in Parquet parts.

B rows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from gr.prepare.write import PartWriter
from gr.schema import TabularSchema

ROWS_PER_GROUP = 16384
ROWS_PER_PART = 1 << 20
Transform = Literal["log1p_clip", "torchrec_minshift"]


def dense_feature(counts_B: np.ndarray, transform: Transform, minimum: int) -> np.ndarray:
    """The named transform of counts (missing ones 0), float32 of the same shape; formulas at gr.schema.DenseTransform.

    minimum: smallest count of the source file, for torchrec_minshift.
    """
    if transform == "log1p_clip":
        return np.log1p(np.maximum(counts_B, 0)).astype(np.float32)
    return np.log(counts_B - minimum + 2).astype(np.float32)


def tabular_table(
    names: Iterable[str], labels_B: np.ndarray, dense: Iterable[np.ndarray], ids: Iterable[np.ndarray]
) -> pa.Table:
    """Columns in the order of schema.json. names: label, dense, ids. dense: float32 [B] each. ids: int32 [B] or
    [B, hots] each; hots above 1 make a list column.
    """
    arrays = [pa.array(labels_B), *map(pa.array, dense), *map(_id_column, ids)]
    return pa.table(dict(zip(names, arrays, strict=True)))


def _id_column(ids: np.ndarray) -> pa.Array:
    hots = 1 if ids.ndim == 1 else ids.shape[1]
    flat = pa.array(ids.reshape(-1))
    if hots == 1:
        return flat
    return pa.ListArray.from_arrays(pa.array(np.arange(len(ids) + 1, dtype=np.int32) * np.int32(hots)), flat)


def column_names(schema: TabularSchema) -> list[str]:
    return [*schema.labels, *schema.dense, *(column.name for column in schema.sparse)]


def write_tabular(folder: Path, schema: TabularSchema, tables: Iterable[pa.Table], title: str) -> None:
    """Write the parts and schema.json of a generated folder. title: name of the progress bar."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = PartWriter(folder, ROWS_PER_GROUP, rows_per_part=ROWS_PER_PART)
    for table in with_progress(tables, title, schema.rows):
        writer.write(table)
    writer.end_part()
    schema.save(folder)


def with_progress(blocks: Iterable[Any], title: str, rows: int | None = None) -> Iterator[Any]:
    """The blocks as they are, and a progress bar of their num_rows. rows: expected sum."""
    with tqdm(total=rows, unit="row", unit_scale=True, desc=title, disable=None) as bar:
        for block in blocks:
            yield block
            bar.update(block.num_rows)

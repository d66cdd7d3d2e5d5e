"""A tabular folder whose ids are raw: 63-bit numbers of a catalogue that moves, and a run that gives them rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gr.config.click import ClickConfig
from gr.ops.splitmix64 import splitmix64
from gr.schema import RAW_IDS, DataSchema, DenseTransform, SourceRows, SparseColumn, TabularSchema
from tests.support.tiny import write_tiny
from tests.support.tiny_tabular import tiny_click_config

COLUMNS = (
    SparseColumn(name="item", cardinality=RAW_IDS),
    SparseColumn(name="tags", cardinality=RAW_IDS, hots=3),
    SparseColumn(name="hour", cardinality=24),
)
ITEM = {"kind": "dynamic", "rows": 128, "ways": 8}
TAGS = {"kind": "dynamic", "rows": 96, "ways": 4, "eviction": "lfu", "half_life": 4.0, "min_count": 2}


def raw(ids: np.ndarray) -> np.ndarray:
    """A raw id, from 0 to 2^63 - 2, for each id."""
    return (splitmix64(torch.from_numpy(ids)) & (RAW_IDS - 1)).numpy()


def write_raw_histories(folder: Path) -> Path:
    """write_tiny with raw item ids."""
    write_tiny(folder)
    for path in folder.glob("part-*.parquet"):
        table = pq.read_table(path)
        lists = table["item_ids"].combine_chunks()
        values = raw(lists.flatten().to_numpy().astype(np.int64))
        items = pa.ListArray.from_arrays(lists.offsets, pa.array(values))
        pq.write_table(table.set_column(table.column_names.index("item_ids"), "item_ids", items), path)
    corpus = pq.read_table(folder / "items.parquet")
    ids = raw(corpus["item_id"].to_numpy().astype(np.int64))
    corpus = corpus.set_column(corpus.column_names.index("item_id"), "item_id", pa.array(ids))
    pq.write_table(corpus.sort_by("item_id"), folder / "items.parquet")
    DataSchema.load(folder).model_copy(update={"item_cardinality": RAW_IDS}).save(folder)
    return folder


def write_raw_clicks(folder: Path, *, rows: int = 1600, seed: int = 0, start: int = 0) -> Path:
    """Rows in the order of time; an item is new one row in four. start: of the catalogue, in rows."""
    random = np.random.default_rng(seed)
    newest = (np.arange(rows) + start) // 4
    labels = random.random(rows) < 0.4
    arrays: dict[str, Any] = {"label": labels.astype(np.float32), "i1": random.normal(size=rows).astype(np.float32)}
    for column in COLUMNS:
        ages = np.exp(random.random((rows, column.hots)) * 5).astype(np.int64)
        ids = newest[:, None] - ages if column.cardinality == RAW_IDS else random.integers(0, 24, (rows, 1))
        if column.cardinality == RAW_IDS:
            ids = raw(ids)
        arrays[column.name] = ids[:, 0] if column.hots == 1 else pa.array(ids.tolist(), pa.list_(pa.int64()))
    folder.mkdir(parents=True)
    pq.write_table(pa.table(arrays), folder / "part-00000.parquet", row_group_size=256)
    TabularSchema(
        format_version=1,
        kind="tabular",
        name="raw",
        labels=["label"],
        dense=["i1"],
        transform=DenseTransform(name="none", version=1),
        sparse=list(COLUMNS),
        rows=rows,
        threshold=1,
        files=[SourceRows(name="generated", rows=rows, minimum=0)],
        source="tests",
    ).save(folder)
    return folder


def raw_click_config(path: Path, run_dir: Path, /, **sections: Any) -> ClickConfig:
    """tiny_click_config with dynamic ids for both raw columns; 1,600 rows are 50 steps of 32."""
    tables = {"item": {"ids": ITEM}, "tags": {"ids": TAGS}, **sections.pop("tables", {})}
    embeddings = {"init": "truncated_normal", "optimizer": {"kind": "adam", "lr": 0.01}, "tables": tables}
    embeddings |= sections.pop("embeddings", {})
    trainer = {"steps": 50, "global_batch_size": 32} | sections.pop("trainer", {})
    return tiny_click_config(path, run_dir, embeddings=embeddings, trainer=trainer, **sections)

"""A tabular folder whose ids are raw: 63-bit numbers of a catalogue that moves, and a run that gives them rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gr.config.click import ClickConfig
from gr.ops.splitmix64 import splitmix64
from gr.schema import DenseTransform, SourceRows, SparseColumn, TabularSchema
from tests.support.tiny_tabular import tiny_click_config

RAW = 2**63 - 1  # cardinality of a column of any ids
COLUMNS = (
    SparseColumn(name="item", cardinality=RAW),
    SparseColumn(name="tags", cardinality=RAW, hots=3),
    SparseColumn(name="hour", cardinality=24),
)
ITEM = {"kind": "dynamic", "rows": 128, "ways": 8}
TAGS = {"kind": "dynamic", "rows": 96, "ways": 4, "eviction": "lfu", "half_life": 4.0, "min_count": 2}


def write_raw_clicks(folder: Path, *, rows: int = 1600, seed: int = 0, start: int = 0) -> Path:
    """Rows in the order of time; an item is new one row in four. start: of the catalogue, in rows."""
    random = np.random.default_rng(seed)
    newest = (np.arange(rows) + start) // 4
    labels = random.random(rows) < 0.4
    arrays: dict[str, Any] = {"label": labels.astype(np.float32), "i1": random.normal(size=rows).astype(np.float32)}
    for column in COLUMNS:
        ages = np.exp(random.random((rows, column.hots)) * 5).astype(np.int64)
        ids = newest[:, None] - ages if column.cardinality == RAW else random.integers(0, 24, (rows, 1))
        if column.cardinality == RAW:
            ids = (splitmix64(torch.from_numpy(ids)) & (RAW - 1)).numpy()
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

"""A tabular data folder and a configuration small enough to train in a second."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.config.click import ClickConfig
from gr.schema import DenseTransform, SourceRows, SparseColumn, TabularSchema

DENSE = ("i1", "i2", "i3")
# Enough rows that none of four equal blocks of them is empty.
COLUMNS = (
    SparseColumn(name="c1", cardinality=41),
    SparseColumn(name="c2", cardinality=64, hots=3),
    SparseColumn(name="c3", cardinality=23),
)


def write_tiny_tabular(
    folder: Path,
    *,
    rows: int = 293,
    seed: int = 0,
    columns: tuple[SparseColumn, ...] = COLUMNS,
    dense: tuple[str, ...] = DENSE,
) -> Path:
    """Rows whose label follows i1 and what a third of the ids stand for, in two parts with row groups of 16."""
    random = np.random.default_rng(seed)
    dense_NI = random.normal(size=(rows, len(DENSE))).astype(np.float32)
    logits = 1.5 * dense_NI[:, 0] - 0.5
    arrays = {name: pa.array(dense_NI[:, DENSE.index(name)]) for name in dense}
    for column in columns:
        ids = random.integers(0, column.cardinality, (rows, column.hots)).astype(np.int32)
        logits += (ids % 3 == 0).sum(1) / column.hots
        arrays[column.name] = pa.array(ids[:, 0] if column.hots == 1 else ids.tolist(), _kind(column))
    labels = random.random(rows) < 1 / (1 + np.exp(-logits))
    table = pa.table({"label": pa.array(labels.astype(np.float32)), **arrays})
    folder.mkdir(parents=True)
    half = rows // 2
    for part, piece in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(piece, folder / f"part-{part:05d}.parquet", row_group_size=16)
    TabularSchema(
        format_version=1,
        kind="tabular",
        name="tiny",
        labels=["label"],
        dense=list(dense),
        transform=DenseTransform(name="log1p_clip", version=1),
        sparse=list(columns),
        rows=rows,
        threshold=1,
        files=[SourceRows(name="generated", rows=rows, minimum=0)],
        source="tests",
    ).save(folder)
    return folder


def _kind(column: SparseColumn) -> pa.DataType:
    return pa.int32() if column.hots == 1 else pa.list_(pa.int32())


def tiny_click_config(path: Path, run_dir: Path, /, **sections: object) -> ClickConfig:
    """DLRM of width 8, 12 steps of 24 rows; `sections` replace or extend the sections of the configuration."""
    tree: dict = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "data": {"path": str(path)},
        "model": {"dim": 8, "bottom": [12, 8], "top": [10, 1]},
        "task": {"kind": "click"},
        "embeddings": {"init": "uniform_rows", "optimizer": {"kind": "adagrad", "lr": 0.05}},
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "trainer": {"steps": 12, "global_batch_size": 24, "log_every": 1},
        "evaluation": {"global_batch_size": 32},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return ClickConfig.model_validate(tree)

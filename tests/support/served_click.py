"""A click model that is small enough to be exported in a test, with vocabularies, and requests in its own values."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.dist import world
from gr.experiment import train
from gr.schema import TabularSchema, vocabulary_file
from tests.support.tiny_tabular import DENSE, tiny_click_config, write_tiny_tabular


def write_data(folder: Path, dense: tuple[str, ...] = DENSE) -> Path:
    """tiny_tabular's folder, where c1's ids stand for text and c3's for numbers; c2 has no vocabulary."""
    write_tiny_tabular(folder, dense=dense)
    (folder / "vocabulary").mkdir()
    digests = {}
    for name, values in (
        ("c1", pa.array([f"v{place:02d}" for place in range(1, 41)])),
        ("c3", pa.array(range(100, 122), pa.int64())),
    ):
        path = folder / vocabulary_file(name)
        ids = np.arange(1, len(values) + 1)
        pq.write_table(pa.table({"value": values, "id": ids, "count": ids}), path)
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    TabularSchema.load(folder).model_copy(update={"vocabularies": digests}).save(folder)
    return folder


def train_click(data: Path, run_dir: Path, **sections: object) -> Path:
    """Trains in this process, alone, and returns the run folder."""
    assert not os.environ.keys() & {"RANK", "WORLD_SIZE"}, "one process"
    config = tiny_click_config(data, run_dir, **sections)
    with world("cpu") as alone:
        train(config, alone)
    return run_dir


def click_columns(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A request of so many rows in the model's own values, all of them seen in training."""
    random = np.random.default_rng(seed)
    return {
        **{name: random.normal(size=rows).astype(np.float32) for name in ("i1", "i2", "i3")},
        "c1": np.array([f"v{place:02d}" for place in random.integers(1, 41, rows)], dtype=object),
        "c2": random.integers(0, 64, (rows, 3)),
        "c3": random.integers(100, 122, rows),
    }


def as_rows(columns: dict[str, np.ndarray]) -> pa.Table:
    """The same request as a table for gr.load(...).score."""
    return pa.table({name: pa.array(list(values) if values.ndim > 1 else values) for name, values in columns.items()})

"""Small data folders for the data tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import Dataset
from gr.schema import DataSchema

USERS = 37
Rows = Sequence[Sequence[int]]


def write_folder(
    folder: Path,
    rows: Rows,
    *,
    times: Rows | None = None,
    group_rows: int = 4,
    part_rows: int = 8,
    cardinality: int = 50,
) -> Path:
    """A data folder with these histories, written without gr's own writer, so that rows may be bad."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "user_id": pa.array(range(100, 100 + len(rows)), pa.int64()),
        "item_ids": pa.array(rows, pa.list_(pa.int32())),
    }
    if times is not None:
        columns["timestamps"] = pa.array(times, pa.list_(pa.int64()))
    table = pa.table(columns)
    for part, start in enumerate(range(0, max(len(rows), 1), part_rows)):
        pq.write_table(table.slice(start, part_rows), folder / f"part-{part:05d}.parquet", row_group_size=group_rows)
    ids = np.arange(1, cardinality)
    pq.write_table(pa.table({"item_id": ids, "count": np.zeros_like(ids)}), folder / "items.parquet")
    DataSchema(
        format_version=1,
        name="test",
        item_cardinality=cardinality,
        timestamps=times is not None,
        ratings=False,
        order="as given",
        users=max(len(rows), 1),
        events=sum(len(row or []) for row in rows),
        items=cardinality - 1,
        source="a test",
    ).save(folder)
    return folder


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """write_folder into a fresh folder."""

    def make(rows: Rows, **options: object) -> Path:
        return write_folder(tmp_path / "data", rows, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def dataset(make_folder: Callable[..., Path]) -> Dataset:
    """USERS histories; user u has items u+1, u+1, ...: an example says whose it is."""
    rows = [[u + 1] * (2 + u % 5) for u in range(USERS)]
    return Dataset.open(make_folder(rows, times=[[9] * len(row) for row in rows]))

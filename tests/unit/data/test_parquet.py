"""A flipped bit in a data folder is an error that names file and row group, or it changes nothing: never other data."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gr.data.dataset import Dataset
from gr.data.tabular import TabularDataset
from gr.errors import DataError
from gr.prepare.synthetic_clicks import ClickOptions, write_clicks
from tests.support.tiny_histories import write_histories

FLIPS = 60


def histories(folder: Path) -> Path:
    write_histories(folder, users=200)
    return folder


def clicks(folder: Path) -> Path:
    write_clicks(ClickOptions(rows=600, test_rows=10), folder)
    return folder / "train"


def of_histories(folder: Path) -> Iterator[np.ndarray]:
    dataset = Dataset.open(folder)
    yield from dataset.corpus()
    for index in range(len(dataset.row_groups)):
        group = dataset.read_row_group(index, ["user_id", *dataset.schema.event_columns, *dataset.schema.user_columns])
        yield group.offsets
        yield from group.columns.values()


def of_clicks(folder: Path) -> Iterator[np.ndarray]:
    dataset = TabularDataset.open(folder)
    for index in range(len(dataset.row_groups)):
        rows = dataset.read_row_group(index)
        yield from (rows.labels_B, rows.dense_BN, rows.ids_BH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "read", "file"),
    [
        (histories, of_histories, "part-00000.parquet"),
        (histories, of_histories, "items.parquet"),
        (clicks, of_clicks, "part-00000.parquet"),
    ],
)
def test_no_flipped_bit_becomes_other_data(
    tmp_path: Path, write: Callable[[Path], Path], read: Callable[[Path], Iterator[Any]], file: str
) -> None:
    (tmp_path / "data").mkdir()
    folder = write(tmp_path / "data")
    expected, whole = list(read(folder)), (folder / file).read_bytes()
    random, refused = np.random.default_rng(0), 0
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        (folder / file).write_bytes(damaged)
        try:
            got = list(read(folder))
        except DataError as error:
            assert str(folder / file) in str(error) or str(folder) in str(error)
            refused += 1
            continue
        assert len(got) == len(expected) and all(map(np.array_equal, got, expected))
    assert refused > FLIPS // 2

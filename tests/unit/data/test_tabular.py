"""Tabular folders: what is checked when they are read, and the batches of the loader."""

import threading
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.batch import TabularBatch
from gr.data.loader import ResumableLoader
from gr.data.tabular import TabularDataset
from gr.data.tabular_pass import TabularPass
from gr.errors import CheckpointError, ConfigError, DataError
from gr.schema import DataSchema, DenseTransform, SourceRows, SparseColumn, TabularSchema

ROWS = 50
COLUMNS = {
    "label": pa.array([float(n % 2) for n in range(ROWS)], pa.float32()),
    "i1": pa.array([None if n == 3 else n / 8 for n in range(ROWS)], pa.float32()),
    "i2": pa.array([-n / 8 for n in range(ROWS)], pa.float32()),
    "c1": pa.array([None if n == 4 else n for n in range(ROWS)], pa.int32()),
    "c2": pa.array([None if n == 4 else [n, n + 1, n + 2] for n in range(ROWS)], pa.list_(pa.int32())),
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A tabular folder of 2 parts (32 and 18 rows) in row groups of 8; `changes` replace columns."""

    def write(rows: int = ROWS, **changes: pa.Array | None) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        columns = {name: column for name, column in (COLUMNS | changes).items() if column is not None}
        table = pa.table(columns)
        for part, start in enumerate((0, 32)):
            size = 32 if part == 0 else ROWS
            pq.write_table(table.slice(start, size), folder / f"part-{part:05d}.parquet", row_group_size=8)
        TabularSchema(
            format_version=1,
            kind="tabular",
            name="test",
            labels=["label"],
            dense=["i1", "i2"],
            transform=DenseTransform(name="log1p_clip", version=1),
            sparse=[SparseColumn(name="c1", cardinality=ROWS), SparseColumn(name="c2", cardinality=60, hots=3)],
            rows=rows,
            threshold=1,
            files=[SourceRows(name="test", rows=rows, minimum=0)],
            source="a test",
        ).save(folder)
        return folder

    return write


def values(column: str) -> list:
    return COLUMNS[column].to_pylist()


def test_rows(make: Make) -> None:
    dataset = TabularDataset.open(make())
    assert dataset.rows == ROWS and dataset.row_counts == [8, 8, 8, 8, 8, 8, 2]
    group = dataset.read_row_group(0)
    assert group.labels_B.tolist() == [0, 1, 0, 1, 0, 1, 0, 1] and group.dense_BN.dtype == np.float32
    assert group.dense_BN[2:5].tolist() == [[0.25, -0.25], [0, -0.375], [0.5, -0.5]]  # a null is 0
    assert group.ids_BH[3:6].tolist() == [[3, 3, 4, 5], [0, 0, 0, 0], [5, 5, 6, 7]]


def replaced(column: str, row: int, value: object) -> dict[str, pa.Array]:
    changed = values(column)
    changed[row] = value
    return {column: pa.array(changed, COLUMNS[column].type)}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", None, "column label: is null"),
        ("label", float("nan"), "column label: is nan"),
        ("i2", float("inf"), "column i2: is inf, not a finite number"),
        ("c1", -1, "column c1: is id -1, allowed are 0 to 49"),
        ("c1", 50, "column c1: is id 50"),
        ("c2", [1, 2, 60], "column c2: element 2 is id 60, allowed are 0 to 59"),
        ("c2", [1, 2], "column c2: holds 2 ids, wanted 3"),
    ],
)
def test_bad_values_are_placed(make: Make, column: str, value: object, message: str) -> None:
    dataset = TabularDataset.open(make(**replaced(column, 21, value)))
    dataset.read_row_group(1)
    with pytest.raises(DataError, match=rf"part-00000\.parquet: row group 2, row 5, {message}"):
        dataset.read_row_group(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"i2": None}, "has no column i2, which schema.json asks for"),
        ({"c1": COLUMNS["i1"].cast(pa.string())}, "column c1 has type string, wanted integers"),
        ({"c2": COLUMNS["c1"]}, "column c2 has type int32, wanted a list of integers"),
        ({"rows": 51}, r"2 parts hold 50 rows, schema\.json says rows=51"),
    ],
)
def test_folders_that_do_not_fit_their_schema(make: Make, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TabularDataset.open(make(**changes))


def test_folders_that_are_none(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        TabularDataset.open(tmp_path / "none")
    folder = make()
    with pytest.raises(DataError, match="describes a tabular folder, this reads histories folders"):
        DataSchema.load(folder)
    part = folder / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-00001\.parquet: is not a whole Parquet file"):
        TabularDataset.open(folder)
    for each in folder.glob("part-*"):
        each.unlink()
    with pytest.raises(DataError, match="has no part"):
        TabularDataset.open(folder)


def loader(
    folder: Path, rank: int = 0, world_size: int = 1, size: int = 12, start_step: int = 0, **options: object
) -> ResumableLoader[TabularBatch]:
    rows = TabularPass(
        TabularDataset.open(folder),
        global_batch_size=size,
        rank=rank,
        world_size=world_size,
        **options,  # type: ignore[arg-type]
    )
    return ResumableLoader(rows, start=start_step)


def rows_of(batch: TabularBatch) -> list[int]:
    """Row numbers of a batch, by its i2; and a check that its other columns are of the same rows."""
    numbers = (-8 * batch.dense_BN[:, 1]).int().tolist()
    size = len(numbers)
    assert batch.dense_BN[:, 0].tolist() == [values("i1")[n] or 0 for n in numbers]
    assert batch.labels_B.tolist() == [values("label")[n] for n in numbers]
    assert batch.sparse.keys() == ["c1", "c2"] and batch.sparse.stride() == size
    assert batch.sparse.lengths().tolist() == [1] * size + [3] * size and batch.sparse.values().dtype == torch.int64
    assert batch.sparse["c1"].values().tolist() == [values("c1")[n] or 0 for n in numbers]
    assert batch.sparse["c2"].values().view(-1, 3).tolist() == [values("c2")[n] or [0, 0, 0] for n in numbers]
    return numbers


def rows_of_all(batches: Iterable[TabularBatch]) -> list[int]:
    return list(chain.from_iterable(map(rows_of, batches)))


def test_file_order_at_any_world_size(make: Make) -> None:
    folder = make()
    for world_size in (1, 2, 3, 4):
        ranks = [list(loader(folder, rank, world_size)) for rank in range(world_size)]
        for step, batches in enumerate(zip(*ranks, strict=True)):
            assert [len(rows_of(batch)) for batch in batches] == [12 // world_size] * world_size
            assert rows_of_all(batches) == list(range(12 * step, 12 * step + 12))
            assert {batch.first_example for batch in batches} == {12 * step}
        assert len(ranks[0]) == 4


def test_shuffled_order(make: Make) -> None:
    folder = make()
    once = [rows_of(batch) for batch in loader(folder, shuffle_seed=3, size=10)]
    order = [row for rows in once for row in rows]
    assert sorted(order) == list(range(ROWS)) and order != list(range(ROWS))
    halves = [list(loader(folder, rank, 2, shuffle_seed=3, size=10)) for rank in (0, 1)]
    assert [rows_of_all(pair) for pair in zip(*halves, strict=True)] == once
    assert rows_of_all(loader(folder, shuffle_seed=4, size=10)) != order
    part = rows_of_all(loader(folder, shuffle_seed=3, size=5, rows=slice(10, 45)))
    assert sorted(part) == list(range(10, 45))


def test_part_of_the_rows_and_the_last_batch(make: Make) -> None:
    folder = make()
    with loader(folder, rows=slice(5, 47), size=8) as batches:
        assert rows_of_all(batches) == list(range(5, 45))
        assert batches.counters() == {"dropped_examples": 2} and len(batches) == 5
    ranks = [list(loader(folder, rank, 4, rows=slice(5, 47), size=8, drop_last=False)) for rank in range(4)]
    steps = [rows_of_all(step) for step in zip(*ranks, strict=True)]
    assert steps[5] == [45, 46] and [len(rank[5].labels_B) for rank in ranks] == [0, 1, 0, 1]


@pytest.mark.parametrize("seed", [None, 7])
def test_resume_at_another_world_size(make: Make, seed: int | None) -> None:
    folder = make()
    whole = [rows_of(batch) for batch in loader(folder, shuffle_seed=seed)]
    with loader(folder, shuffle_seed=seed) as first:
        assert [rows_of(next(first)) for _ in range(2)] == whole[:2]
        state = first.state_dict()
    ranks = [loader(folder, rank, 2, shuffle_seed=seed) for rank in (0, 1)]
    for each in ranks:
        next(each)  # what it gave before does not matter
        each.load_state_dict(state)
    assert [rows_of_all(pair) for pair in zip(*ranks, strict=True)] == whole[2:]
    assert [rows_of(batch) for batch in loader(folder, shuffle_seed=seed, start_step=3)] == whole[3:]
    with pytest.raises(CheckpointError, match="has shuffle_seed"):
        loader(folder, shuffle_seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="has global_batch_size=12, this run has global_batch_size=6"):
        loader(folder, shuffle_seed=seed, size=6).load_state_dict(state)


def test_a_state_past_the_end_is_refused(make: Make) -> None:
    """The last batch is one that drop_last leaves out, which the state does not tell."""
    folder = make()
    with loader(folder, drop_last=False) as source:
        assert len(list(source)) == len(source) == 5
        state = source.state_dict()
    with pytest.raises(CheckpointError, match="step 5 is outside the pass; it has 4 batches"):
        loader(folder).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 5}, "not divisible by the world size 5"),
        ({"size": 60}, "50 rows do not fill one batch of 60"),
        ({"rows": slice(10, 51)}, "are no part of the 50 rows"),
        ({"rows": slice(10, 10)}, "are no part of the 50 rows"),
        ({"rows": slice(0, 10, 2)}, "are no part of the 50 rows"),
        ({"start_step": 5}, "step 5 is outside the pass; it has 4 batches"),
    ],
)
def test_loaders_that_cannot_be(make: Make, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(make(), **options)


def test_errors_of_the_reading_threads_reach_the_caller(make: Make) -> None:
    batches = loader(make(**replaced("c1", 30, 99)), size=8)
    assert rows_of(next(batches)) == list(range(8))
    for _ in range(2):
        with pytest.raises(DataError, match="row group 3, row 6, column c1: is id 99"):
            list(batches)


def test_close_ends_the_threads(make: Make) -> None:
    before = threading.active_count()
    batches = loader(make(), size=2)
    next(batches)
    batches.close()
    batches.close()
    assert threading.active_count() == before and list(batches) == []


def test_the_only_label(make: Make) -> None:
    """From footers, also where a name has a dot, which in Parquet separates the parts of a path."""
    assert TabularDataset.open(make()).only_label() is None
    folder = make(label=pa.array([True] * ROWS))
    assert TabularDataset.open(folder).only_label() == 1
    for part in folder.glob("part-*"):
        table = pq.read_table(part)
        pq.write_table(table.rename_columns(["label.x", *table.column_names[1:]]), part)
    schema = folder / "schema.json"
    schema.write_text(schema.read_text().replace('"label"', '"label.x"'))
    dataset = TabularDataset.open(folder)
    assert dataset.only_label() == 1 and dataset.read_row_group(0).labels_B.all()


def test_columns_that_the_schema_does_not_name_are_ignored(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(i3=COLUMNS["i2"], __index_level_0__=pa.array(range(ROWS)))
    with caplog.at_level("INFO", logger="gr"):
        TabularDataset.open(folder)
        TabularDataset.open(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder}: ignores __index_level_0__, i3, not in schema.json"
    ]

"""Reading: every fault is named with its exact place."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import Dataset
from gr.errors import DataError

GOOD = [[1, 2, 3], [4, 5], [6], [], [7, 8, 9], [1], [2, 2], [3], [4, 5, 6, 7]]
Make = Callable[..., Path]


def test_reads_row_groups_in_file_order(make_folder: Make) -> None:
    dataset = Dataset.open(make_folder(GOOD))
    assert dataset.row_counts == [4, 4, 1] and dataset.rows == 9
    groups = [dataset.read_row_group(i) for i in range(3)]
    rows = [g.columns["item_ids"][a:b].tolist() for g in groups for a, b in zip(g.offsets, g.offsets[1:], strict=False)]
    assert rows == GOOD
    assert groups[0].columns["item_ids"].dtype == np.int32
    assert dataset.read_row_group(1, ["user_id"]).columns["user_id"].tolist() == [104, 105, 106, 107]


def bad(row: int, change: object) -> list:
    return [*GOOD[:row], change, *GOOD[row + 1 :]]


@pytest.mark.parametrize(
    ("rows", "place", "problem"),
    [
        (bad(5, None), r"part-00000\.parquet: row group 1, row 1, column item_ids", "the list is null"),
        (bad(1, [4, None]), r"part-00000\.parquet: row group 0, row 1, column item_ids", "element 1 is null"),
        (bad(8, [4, 5, 0, 7]), r"part-00001\.parquet: row group 0, row 0, column item_ids", "element 2 is item id 0"),
        (bad(4, [7, -3]), r"part-00000\.parquet: row group 1, row 0, column item_ids", "element 1 is item id -3"),
        (bad(2, [50]), r"row group 0, row 2, column item_ids", "element 0 is item id 50, allowed are 1 to 49"),
    ],
)
def test_bad_items(make_folder: Make, rows: list, place: str, problem: str) -> None:
    dataset = Dataset.open(make_folder(rows))
    with pytest.raises(DataError, match=f"{place}: {problem}"):
        for index in range(3):
            dataset.read_row_group(index)
    emptied = [dataset.read_row_group(index, on_bad_row="skip") for index in range(3)]
    changed = next(i for i, row in enumerate(rows) if row is not GOOD[i])
    expected = [0 if i == changed else len(row) for i, row in enumerate(GOOD)]
    assert np.concatenate([group.lengths_B for group in emptied]).tolist() == expected
    dataset.read_row_group(changed // 4, on_bad_row="skip")
    assert dataset.bad_rows == 1  # distinct rows, however often they are read


@pytest.mark.parametrize(
    ("times", "problem"),
    [
        ([[5, 6], [1, 2]], "row 0, column timestamps: 2 values for 3 items"),
        ([[5, 6, 7], [3, 2]], "row 1, column timestamps: element 1 is 2, earlier than 3"),
        ([[5, 6, 7], None], "row 1, column timestamps: the list is null"),
        ([[5, None, 7], [1, 1]], "row 0, column timestamps: element 1 is null"),
    ],
)
def test_bad_times(make_folder: Make, times: list, problem: str) -> None:
    dataset = Dataset.open(make_folder([[1, 2, 3], [4, 5]], times=times))
    with pytest.raises(DataError, match=rf"row group 0, {problem}"):
        dataset.read_row_group(0)
    group = dataset.read_row_group(0, on_bad_row="skip")
    assert sorted(group.lengths_B.tolist()) in ([0, 2], [0, 3])
    assert len(group.columns["timestamps"]) == len(group.columns["item_ids"]) == group.offsets[-1]


def test_equal_times_and_next_user_earlier_are_good(make_folder: Make) -> None:
    folder = make_folder([[1, 2], [], [3, 4]], times=[[9, 9], [], [1, 2]])
    assert Dataset.open(folder).read_row_group(0).columns["timestamps"].tolist() == [9, 9, 1, 2]


def rewrite(file: Path, table: pa.Table) -> None:
    pq.write_table(table, file)


def set_schema(folder: Path, **change: object) -> None:
    path = folder / "schema.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_missing_pieces(tmp_path: Path, make_folder: Make) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        Dataset.open(tmp_path / "nowhere")
    folder = make_folder(GOOD)
    for part in sorted(folder.glob("part-*"))[1:]:
        part.unlink()
    with pytest.raises(DataError, match=r"1 parts hold 8 rows, schema.json says users=9"):
        Dataset.open(folder)
    (folder / "part-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"has no part-\*\.parquet"):
        Dataset.open(folder)
    (folder / "items.parquet").unlink()
    (folder / "schema.json").unlink()
    with pytest.raises(DataError, match=r"schema\.json: cannot be read"):
        Dataset.open(folder)


def test_other_layouts_are_told_apart(make_folder: Make) -> None:
    folder = make_folder(GOOD)
    first, second = sorted(folder.glob("part-*"))
    first.rename(folder / "b.parquet")
    (folder / "items.parquet").rename(folder / "c.parquet")
    second.rename(folder / "a.parquet")
    with pytest.raises(DataError, match=r"has no part-\*\.parquet, but 3 files as a\.parquet: rename those with rows"):
        Dataset.open(folder)
    (folder / "day=2024-01-02").mkdir()
    with pytest.raises(DataError, match=r"but 1 folders as day=2024-01-02, which are not read: write it without part"):
        Dataset.open(folder)


def test_a_part_without_rows_is_passed_over(make_folder: Make) -> None:
    folder = make_folder(GOOD)
    part = folder / "part-00000.parquet"
    pq.write_table(pq.read_table(part).slice(0, 0), folder / "part-00000-b.parquet")
    dataset = Dataset.open(folder)
    assert dataset.row_counts == [4, 4, 1] and len(dataset.read_row_group(2).columns["item_ids"]) == 4


def test_what_footers_tell(make_folder: Make) -> None:
    folder = make_folder(GOOD)  # 17 events, and a user without events
    for events in (9, 17, 18):
        set_schema(folder, events=events)
        Dataset.open(folder)
    for events in (8, 19):
        set_schema(folder, events=events)
        with pytest.raises(DataError, match=rf"parts hold 9 to 18 events, schema\.json says events={events}"):
            Dataset.open(folder)
    set_schema(folder, events=17)
    part = folder / "part-00000.parquet"
    table = pq.read_table(part)
    users = pa.array([None, *range(7)], pa.int64())
    rewrite(part, table.set_column(0, "user_id", users))
    with pytest.raises(DataError, match=r"row group 0: 1 rows have a null user_id: give each user an id"):
        Dataset.open(folder)


def test_cut_off_and_empty_files(make_folder: Make) -> None:
    folder = make_folder(GOOD)
    part = folder / "part-00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-00001\.parquet: is not a whole Parquet file"):
        Dataset.open(folder)
    part.write_bytes(b"")
    with pytest.raises(DataError, match=r"part-00001\.parquet: is empty"):
        Dataset.open(folder)


def test_damaged_page(make_folder: Make) -> None:
    folder = make_folder(GOOD)
    part = folder / "part-00000.parquet"
    dataset = Dataset.open(folder)
    content = bytearray(part.read_bytes())
    content[4:400] = b"\xff" * 396
    part.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000\.parquet: row group 0: cannot be decoded"):
        dataset.read_row_group(0)


def test_a_file_that_cannot_be_read_just_now_is_not_damaged(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system says so of a server that restarts: another try may read it."""
    folder = make_folder(GOOD)
    dataset = Dataset.open(folder)

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    reads = {
        "ParquetFile": lambda: dataset.read_row_group(0),
        "read_table": dataset.corpus,
        "read_metadata": lambda: Dataset.open(folder),
    }
    for name, read in reads.items():
        with monkeypatch.context() as broken, pytest.raises(OSError, match="Stale file handle"):
            broken.setattr(pq, name, stale)
            read()
    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        Dataset.open(folder)


def test_columns_and_types(make_folder: Make) -> None:
    folder = make_folder([[1, 2]])
    part = folder / "part-00000.parquet"
    table = pq.read_table(part)
    set_schema(folder, ratings=True)
    with pytest.raises(DataError, match=r"part-00000\.parquet: has no column ratings"):
        Dataset.open(folder)
    set_schema(folder, ratings=False)
    rewrite(part, table.set_column(1, "item_ids", pa.array([["1", "2"]])))
    with pytest.raises(DataError, match=r"column item_ids has type list<.*string>, wanted a list of integers"):
        Dataset.open(folder)
    rewrite(part, table.append_column("age", pa.array([9], pa.int64())))
    set_schema(folder, contextual={"age": 9})
    with pytest.raises(DataError, match="row 0, column age: is 9, allowed are 0 to 8"):
        Dataset.open(folder).read_row_group(0, ["age"])
    with pytest.raises(DataError, match="has no column colour"):
        Dataset.open(folder).read_row_group(0, ["colour"])


def test_large_lists_and_slices(make_folder: Make) -> None:
    folder = make_folder([[1, 2], [3]])
    table = pa.table(
        {"user_id": pa.array([0, 1], pa.int64()), "item_ids": pa.array([[1, 2], [3]], pa.large_list(pa.int64()))}
    )
    rewrite(folder / "part-00000.parquet", table)
    assert Dataset.open(folder).read_row_group(0).columns["item_ids"].tolist() == [1, 2, 3]


def test_corpus(make_folder: Make) -> None:
    folder = make_folder(GOOD, cardinality=12)
    assert Dataset.open(folder).corpus()[0].tolist() == list(range(1, 12))
    for ids, problem in (([1, 3, 2], "row 2: item_id=2"), ([1, 2], "row 2: end of file"), ([0, 1], "row 0: item_id=0")):
        rewrite(folder / "items.parquet", pa.table({"item_id": ids, "count": [0] * len(ids)}))
        with pytest.raises(DataError, match=rf"items\.parquet: {problem}"):
            Dataset.open(folder).corpus()
    (folder / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"items\.parquet: no such file"):
        Dataset.open(folder).corpus()

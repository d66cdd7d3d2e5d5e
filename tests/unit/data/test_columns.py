"""What other writers' Parquet holds is read as the same data, or the value that cannot be is named with its place."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.columns import ColumnType, read_column
from gr.data.dataset import Dataset
from gr.data.tabular import TabularDataset
from gr.errors import DataError
from tests.support.tiny_tabular import write_tiny_tabular

Make = Callable[..., Path]
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
WHOLE = [*INTEGERS, pa.float16(), pa.float32(), pa.float64(), pa.decimal128(38, 2)]
ITEMS, TIMES = [[1, 2, 3], [4, 5, 6]], [[5, 6, 7], [1, 1, 2]]


@pytest.mark.parametrize("kind", ["id", "number", "label", "time"])
@pytest.mark.parametrize("stored", WHOLE, ids=str)
@pytest.mark.parametrize("nulls", [False, True])
def test_whole_numbers_of_every_type(kind: str, stored: pa.DataType, nulls: bool) -> None:
    values = [1, None, 0, 7] if nulls else [1, 2, 0, 7]
    plain = pa.array(values, pa.int64())
    column = read_column(pa.chunked_array([plain.cast(stored)]), ColumnType(kind))  # type: ignore[arg-type]
    assert (
        column.values.to_pylist() == values
        and column.lost is None
        and column.nulls.tolist() == [v is None for v in values]
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: pa.list_(value),
        lambda value: pa.large_list(value),
        lambda value: pa.list_(value, 3),
        lambda value: pa.list_view(value),
        lambda value: pa.large_list_view(value),
    ],
    ids=["list", "large", "fixed size", "view", "large view"],
)
@pytest.mark.parametrize("stored", [pa.int32(), pa.uint64(), pa.float64()], ids=str)
def test_lists_of_every_kind(make_folder: Make, wrap: Callable, stored: pa.DataType) -> None:
    folder = make_folder(ITEMS, times=TIMES)
    table = pa.table(
        {
            "timestamps": pa.array(TIMES, wrap(stored)),
            "item_ids": pa.array(ITEMS, wrap(stored)),
            "user_id": pa.array([3, 4], pa.uint16()),
        }
    )
    pq.write_table(table, folder / "part-00000.parquet")
    columns = Dataset.open(folder).read_row_group(0, ["user_id", "timestamps"]).columns
    assert columns["item_ids"].tolist() == [1, 2, 3, 4, 5, 6] and columns["timestamps"].tolist() == [5, 6, 7, 1, 1, 2]
    assert columns["user_id"].tolist() == [3, 4] and {array.dtype.kind for array in columns.values()} == {"i"}


@pytest.mark.parametrize(
    ("kind", "values", "problem"),
    [
        ("id", pa.array([1, 2**64 - 1], pa.uint64()), "is 18446744073709551615, not a whole number within int64"),
        ("id", pa.array([1, 0.5]), "is 0.5, not a whole number"),
        ("id", pa.array([1, float("nan")]), "is nan, not a whole number"),
        ("id", pa.array([1.0, 2.0**63]), "is 9.223372036854776e[+]18, not a whole number"),
        ("id", pa.array([Decimal("1.0"), Decimal("1.5")]), "is 1.5, not a whole number"),
        ("id", pa.array([Decimal(1), Decimal(2**63)]), "is 9223372036854775808, not a whole number"),
        ("number", pa.array([1, 1e39]), r"is 1e[+]39, beyond float32"),
        ("time", pa.array([1, 1.5]), "is 1.5, not a whole number"),
        ("time", pa.array([1, 2**60], pa.timestamp("s")), ""),
    ],
)
def test_a_value_that_no_cast_keeps_is_named(kind: str, values: pa.Array, problem: str) -> None:
    import re

    from gr.data.validate import value_faults

    wanted = ColumnType(kind, time_unit="ms")  # type: ignore[arg-type]
    column = read_column(pa.chunked_array([values]), wanted)
    assert column.lost is not None and column.lost.tolist() == [False, True]
    if problem:  # Python has no datetime for the last one
        (fault,) = [fault for fault in value_faults("c", column, wanted) if fault is not None]
        assert fault.row == 1 and fault.rows.tolist() == [False, True] and re.match(problem, fault.problem)


@pytest.mark.parametrize("unit", ["s", "ms"])
@pytest.mark.parametrize(
    "stored", [*map(pa.timestamp, ("s", "ms", "us", "ns")), pa.timestamp("us", "Asia/Tokyo")], ids=str
)
def test_datetimes_of_every_unit(make_folder: Make, unit: str, stored: pa.DataType) -> None:
    folder = make_folder([[1, 2]], times=[[1, 2]])
    schema = folder / "schema.json"
    schema.write_text(json.dumps(json.loads(schema.read_text()) | {"time_unit": unit}))
    moments = [datetime(1969, 12, 31, 23, 59, 58, tzinfo=UTC), datetime(2024, 2, 29, 12, tzinfo=UTC)]
    part = folder / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.set_column(2, "timestamps", pa.array([moments], pa.list_(stored))), part)
    assert Dataset.open(folder).read_row_group(0).columns["timestamps"].tolist() == [-2, int(moments[1].timestamp())]


def test_dates(make_folder: Make) -> None:
    folder = make_folder([[1, 2]], times=[[1, 2]])
    part = folder / "part-00000.parquet"
    days = pa.array([[date(1970, 1, 2), date(1970, 1, 3)]])
    pq.write_table(pq.read_table(part).set_column(2, "timestamps", days), part)
    assert Dataset.open(folder).read_row_group(0).columns["timestamps"].tolist() == [86400, 172800]


def test_parts_of_other_types_and_a_lost_value_in_one(make_folder: Make) -> None:
    folder = make_folder([[1]] * 8 + [[2, 3]])
    table = pa.table({"user_id": pa.array([9.0]), "item_ids": pa.array([[2, 3.5]])})
    pq.write_table(table, folder / "part-00001.parquet")
    dataset = Dataset.open(folder)
    assert dataset.read_row_group(0, ["user_id"]).columns["user_id"].dtype == np.int64
    with pytest.raises(DataError, match=r"part-00001\.parquet: row group 0, row 0, column item_ids: element 1 is 3\.5"):
        dataset.read_row_group(2)
    assert dataset.read_row_group(2, on_bad_row="skip").lengths_B.tolist() == [0] and dataset.bad_rows == 1


def test_times_in_a_smaller_unit_than_the_schema_says(make_folder: Make) -> None:
    folder = make_folder([[1, 2]], times=[[1_700_000_000, 1_700_000_000_000]])
    with pytest.raises(DataError, match=r"element 1 is 1700000000000, beyond the year 9999 in s, .* is it ms\?"):
        Dataset.open(folder).read_row_group(0)


def rewritten(folder: Path, change: Callable[[pa.Table], pa.Table]) -> TabularDataset:
    for part in folder.glob("part-*"):
        pq.write_table(change(pq.read_table(part)), part, row_group_size=16)
    return TabularDataset.open(folder)


@pytest.mark.parametrize("label", [pa.bool_(), *INTEGERS, pa.float64()], ids=str)
def test_tabular_folders_of_plain_numbers(tmp_path: Path, label: pa.DataType) -> None:
    """As pandas writes ints, floats and bools, with its index."""
    own = TabularDataset.open(write_tiny_tabular(tmp_path / "own"))

    def widened(table: pa.Table) -> pa.Table:
        types = {"label": label, "c1": pa.int64(), "c2": pa.list_(pa.int64(), 3), "c3": pa.float64()}
        columns = {name: table[name].cast(types.get(name, pa.float64())) for name in table.column_names}
        return pa.table({**columns, "__index_level_0__": np.arange(len(table))})

    other = rewritten(write_tiny_tabular(tmp_path / "other"), widened)
    for index in range(len(own.row_groups)):
        a, b = own.read_row_group(index), other.read_row_group(index)
        for name in ("labels_B", "dense_BN", "ids_BH"):
            assert (
                np.array_equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
            )


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("label", 0.5, "is 0.5, allowed are 0 and 1"),
        ("label", 1 + 1e-12, "is 1.000000000001, allowed are 0 and 1"),
        ("i2", -1e39, r"is -1e\+39, beyond float32"),
        ("c1", float("nan"), "is nan, not a whole number"),
        ("c1", 2.0**40, "is id 1099511627776, allowed are 0 to 40"),
    ],
)
def test_tabular_values_that_no_cast_keeps(tmp_path: Path, column: str, value: float, problem: str) -> None:
    def changed(table: pa.Table) -> pa.Table:
        values = table[column].cast(pa.float64()).to_pylist()
        values[21] = value
        return table.set_column(table.schema.get_field_index(column), column, pa.array(values, pa.float64()))

    dataset = rewritten(write_tiny_tabular(tmp_path / "data"), changed)
    with pytest.raises(DataError, match=rf"part-00000\.parquet: row group 1, row 5, column {column}: {problem}"):
        dataset.read_row_group(1)


@pytest.mark.parametrize("writer", ["pandas", "polars", "duckdb"])
def test_folders_as_other_writers_make_them(make_folder: Make, writer: str) -> None:
    library = pytest.importorskip(writer, reason=f"needs {writer}")
    folder = make_folder(ITEMS, times=TIMES)
    part = folder / "part-00000.parquet"
    moments = [[datetime(2024, 1, 1, 0, 0, second) for second in row] for row in TIMES]
    columns = {"user_id": [3, 4], "item_ids": ITEMS, "timestamps": moments}
    if writer == "pandas":
        library.DataFrame(columns, index=[7, 9]).to_parquet(part)
    elif writer == "polars":
        library.DataFrame(columns).write_parquet(part)
    else:
        times = [f"[{', '.join(f'TIMESTAMP {str(moment)!r}' for moment in row)}]" for row in moments]
        rows = ", ".join(f"({user}, {items}, {t})" for user, items, t in zip([3, 4], ITEMS, times, strict=True))
        library.sql(f"COPY (SELECT * FROM (VALUES {rows}) t(user_id, item_ids, timestamps)) TO '{part}'")
    read = Dataset.open(folder).read_row_group(0, ["user_id", "timestamps"]).columns
    start = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
    assert read["user_id"].tolist() == [3, 4] and read["item_ids"].tolist() == [1, 2, 3, 4, 5, 6]
    assert read["timestamps"].tolist() == [start + second for second in (5, 6, 7, 1, 1, 2)]


@pytest.mark.parametrize("stored", [pa.list_view(pa.int64()), pa.large_list_view(pa.int32()), pa.large_list(pa.int8())])
def test_lists_of_other_lengths_and_nulls(tmp_path: Path, stored: pa.DataType) -> None:
    rows = [[1, 2], [3], None, [], [4, None]]
    pq.write_table(pa.table({"x": pa.array(rows, stored)}), tmp_path / "x.parquet", row_group_size=2)
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        for index in range(3):
            column = read_column(file.read_row_group(index)["x"], ColumnType("id", is_list=True))
            part = rows[2 * index : 2 * index + 2]
            assert column.values.to_pylist() == [value for row in part for value in row or []]
            assert np.diff(column.offsets).tolist() == [len(row or []) for row in part]
            assert column.nulls.tolist() == [row is None for row in part]


def test_fixed_size_lists_with_nulls() -> None:
    array = pa.array([[9, 9], [1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)).slice(1)
    column = read_column(pa.chunked_array([array]), ColumnType("id", is_list=True))
    assert column.values.to_pylist() == [1, 2, 3, 4] and column.offsets.tolist() == [0, 2, 2, 4]
    assert column.nulls.tolist() == [False, True, False]

"""What is missing or there twice in the Parquet of other writers; objects that are no log."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.schema import DataSchema
from tests.support.own_log import LOG, TIMED, decoded, prepared, refusal


@pytest.mark.parametrize("names", [("U", "u"), ("u", "u"), ("U",)])
def test_columns_of_parquet_that_differ_in_case_or_not_at_all(tmp_path: Path, names: tuple[str, ...]) -> None:
    """DuckDB has one column of them, or gives the others names that the file has not."""
    columns = [pa.array(["x", "y"])] * len(names)
    log = pa.Table.from_arrays([*columns, pa.array([1, 2])], names=[*names, "i"])
    pq.write_table(log, tmp_path / "a.parquet")
    fault = refusal(tmp_path, tmp_path / "a.parquet", user="u", item="i")
    assert f"a.parquet: wanted one column u, has {' and '.join(names)}; rename them in the log" in fault


@pytest.mark.parametrize("column", ["u", "t"])
def test_pandas_writes_nan_for_what_is_missing(tmp_path: Path, column: str) -> None:
    """A column of whole numbers with gaps is float64 then, whose NaN are not null in Parquet of polars and arrow."""
    values = {"u": [1.0, 2.0, 2.0, 1.0, 3.0], "t": LOG.t.astype(float)}
    log = pa.table({**{name: pa.array(LOG[name]) for name in "uit"}, **{k: pa.array(v) for k, v in values.items()}})
    odd = pa.array([float("nan"), *log[column].to_pylist()[1:]])
    pq.write_table(log.set_column(log.schema.get_field_index(column), column, odd), tmp_path / "a.parquet")
    fault = f"row 0 of the log, column {column}: is missing, as in 1 rows; correct them, or leave them out with"
    assert fault in refusal(tmp_path, tmp_path / "a.parquet", **TIMED)
    folder = prepared(tmp_path / "o", tmp_path / "a.parquet", **TIMED, on_bad_row="skip")
    assert list(decoded(folder)) == [1, 2, 3] and DataSchema.load(folder).events == 4


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("column", ["rating", "values"])
def test_nan_beside_equal_numbers(tmp_path: Path, kind: str, column: str) -> None:
    """Parquet's least and largest value are 1 then, and DuckDB by default takes the column for a constant."""
    numbers = pa.array(np.array([1, np.nan, 1, 1, 1], dtype=kind))
    pq.write_table(pa.table({**{name: pa.array(LOG[name]) for name in "uit"}, "x": numbers}), tmp_path / "a.parquet")
    names = {"rating": "x", "values": ("x",)}
    fault = refusal(tmp_path, tmp_path / "a.parquet", **TIMED, **{column: names[column]})
    assert fault == "column x: 1 values are missing or no finite numbers; correct or leave out these rows"


def test_a_missing_flag_is_0(tmp_path: Path) -> None:
    table = pa.table({**{name: pa.array(LOG[name]) for name in "uit"}, "l": [0.0, float("nan"), 1.0, 1.0, 0.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    folder = prepared(tmp_path / "o", tmp_path / "a.parquet", **TIMED, actions=("l",))
    actions = pq.read_table(folder / "part-00000.parquet")["actions"].to_pylist()
    assert DataSchema.load(folder).actions == ["l"] and actions == [[1, 0], [0, 1], [0]]


@pytest.mark.parametrize("source", [None, 5, {"u": [1], "i": [2]}, [{"u": 1, "i": 2}], LOG.to_numpy(), pl.LazyFrame()])
def test_sources_that_are_none(tmp_path: Path, source: Any) -> None:
    fault = f"a {type(source).__name__} is no log: pass files, or a table of pandas, polars or pyarrow"
    assert refusal(tmp_path, source, user="u", item="i") == fault


def test_tables_that_are_none(tmp_path: Path) -> None:
    for source in (pd.concat([LOG, LOG[["u"]]], axis=1), LOG.assign(l=pd.arrays.SparseArray(LOG.l))):
        assert refusal(tmp_path, source, user="u", item="i").startswith("the table: is no table of columns: ")

"""Rows for a click model in the log's own values: the arrays and batches that the folder itself gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.data.click_rows import ClickRows
from gr.data.collate_tabular import tabular_batch
from gr.data.tabular import TabularDataset
from gr.data.vocabulary import Vocabulary
from gr.errors import DataError
from gr.schema import TabularSchema
from tests.support.tiny_tabular import write_tiny_tabular


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_tabular(tmp_path / "data", rows=32)


def click_rows(folder: Path, **vocabularies: Vocabulary) -> ClickRows:
    schema = TabularSchema.load(folder)
    return ClickRows(schema, {column.name: Vocabulary(column.name) for column in schema.sparse} | vocabularies)


def test_rows_of_the_folder_itself(folder: Path) -> None:
    """Also with more than one id a row."""
    table = pq.read_table(folder / "part-00000.parquet")
    read, unseen = click_rows(folder).read(table)
    rows = TabularDataset.open(folder).read_row_group(0)
    assert np.array_equal(read.dense_BN, rows.dense_BN) and np.array_equal(read.ids_BH, rows.ids_BH) and not unseen
    batch = tabular_batch(read, TabularSchema.load(folder))
    ids = [batch.sparse[name].values().view(len(table), -1) for name in ("c1", "c2", "c3")]
    assert torch.equal(torch.cat(ids, 1), torch.from_numpy(rows.ids_BH).long())
    assert len(click_rows(folder).read(table[:0])[0].labels_B) == 0


def test_missing_and_unseen_values_are_0(folder: Path) -> None:
    table = pq.read_table(folder / "part-00000.parquet")[:3]
    own = Vocabulary("c1", np.array([1, 2]), pa.array(["a", "b"]))
    table = table.drop("c1").append_column("c1", pa.array(["b", None, "new"]))
    table = table.drop("i1").append_column("i1", pa.array([None, 2, 3]))
    read, unseen = click_rows(folder, c1=own).read(table)
    assert read.ids_BH[:, 0].tolist() == [2, 0, 0]
    assert read.dense_BN[:, 0].tolist() == [0.0, 2.0, 3.0]
    assert unseen == {"c1": 1}, "a null is missing, not unseen"


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("i2", None, "the input: has no column i2; it has"),
        ("i2", ["a"], "the input: column i2 has type string, wanted numbers"),
        ("i2", [1e39], "row 0, column i2: is 1e+39, beyond float32"),
        ("i2", [float("nan")], "row 0, column i2: is nan, not a finite number"),
        ("c1", [41], "column c1: is id 41, allowed are 0 to 40"),
        ("c1", [-1], "column c1: is id -1, allowed are 0 to 40"),
        ("c1", [[1]], "cannot be looked up"),
        ("c2", [7], "column c2 has type int64, wanted lists of 3 ids"),
        ("c2", [[1, 2]], "row 0, column c2: holds 2 ids, wanted 3"),
        ("c2", [None], "row 0, column c2: holds 0 ids, wanted 3"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_are_refused(folder: Path, name: str, values: list[Any] | None, fault: str) -> None:
    table = pq.read_table(folder / "part-00000.parquet")[:1].drop(name)
    if values is not None:
        table = table.append_column(
            name, pa.array(values if name != "c2" or values != [None] else pa.array([None], pa.list_(pa.int32())))
        )
    with pytest.raises(DataError) as error:
        click_rows(folder).read(table)
    assert fault in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int8])
def test_plain_numbers_are_read_as_through_arrow(folder: Path, dtype: type) -> None:
    """With and without a vocabulary of numbers; anything else is left to `read`."""
    own = Vocabulary("c3", np.array([1, 2, 5]), pa.array([-7, 3, 9], pa.int64()))
    rows = click_rows(folder, c3=own)
    columns = {
        **{name: np.array([0.5, -1e38, 3]) for name in ("i1", "i2", "i3")},
        "c1": np.array([0, 40, 7], dtype=dtype),
        "c2": np.array([[0, 1, 2], [63, 3, 3], [0, 0, 0]], dtype=dtype),
        "c3": np.array([9, 4, -7], dtype=dtype),
    }
    table = pa.table({name: pa.array(values.tolist()) for name, values in columns.items()})
    plain = rows.read_plain(columns)
    assert plain is not None
    (read, unseen), (expected, expected_unseen) = plain, rows.read(table)
    assert np.array_equal(read.dense_BN, expected.dense_BN) and np.array_equal(read.ids_BH, expected.ids_BH)
    assert unseen == expected_unseen == {"c3": 1} and read.ids_BH[:, -1].tolist() == [5, 0, 1]
    for name, values in (
        ("i1", np.array([np.nan, 0, 0])),
        ("i1", np.array([1e39, 0, 0])),
        ("i1", np.array([True, False, True])),
        ("c1", np.array([41, 0, 0])),
        ("c1", np.array([-1, 0, 0])),
        ("c1", np.array([1.0, 0, 0])),
        ("c1", np.array([2**64 - 1, 0, 0], dtype=np.uint64)),
    ):
        assert rows.read_plain({**columns, name: values}) is None, name
    assert click_rows(folder, c3=Vocabulary("c3", np.array([1]), pa.array(["a"]))).read_plain(columns) is None

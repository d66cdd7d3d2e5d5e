"""`gr prepare multi-hot`: the rows of a tabular folder with the ids of the published recipe."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gr.cli.prepare import command
from gr.data.tabular import TabularDataset
from gr.errors import ConfigError, DataError
from gr.prepare import multi_hot
from gr.schema import SparseColumn
from tests.support.published_multi_hot import published_tables
from tests.support.tiny_tabular import DENSE, write_tiny_tabular

ONE_ID = tuple(SparseColumn(name=f"c{n}", cardinality=size) for n, size in enumerate((41, 9, 300), 1))
HOTS = (3, 1, 5)
KNOWN = [33, 0, 14, 4, 27, 11, 104, 212, 138]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_tabular(tmp_path / "one", columns=ONE_ID)


def prepare(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, ["multi-hot", *map(str, arguments)])


def test_the_ids_of_the_published_recipe_and_all_else_as_it_was(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    result = prepare("--source", source, "--out", out, "--hots", "3,1,5")
    assert result.exit_code == 0 and result.output.endswith("293 rows, 9 ids a row in 3 columns\n"), result.output
    data, before = TabularDataset.open(out), TabularDataset.open(source)
    assert [column.hots for column in data.schema.sparse] == list(HOTS)
    assert data.row_counts == before.row_counts and "multi-hot of" in data.schema.source
    tables = published_tables(tuple(column.cardinality for column in ONE_ID), HOTS)
    for index in range(len(data.row_groups)):
        rows, old = data.read_row_group(index), before.read_row_group(index)
        expected = np.concatenate([t[ids] for t, ids in zip(tables, old.ids_BH.T, strict=True)], axis=1)
        np.testing.assert_array_equal(rows.ids_BH, expected)
        np.testing.assert_array_equal(rows.dense_BN, old.dense_BN)
        np.testing.assert_array_equal(rows.labels_B, old.labels_B)
    assert pq.read_schema(out / "part-00000.parquet").names == ["label", *DENSE, "c1", "c2", "c3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"], "the tables are gone"


def test_known_ids(source: Path, tmp_path: Path) -> None:
    """Known values of numpy's legacy stream, through the whole command."""
    assert prepare("--source", source, "--out", tmp_path / "many", "--hots", "3,1,5").exit_code == 0
    rows = TabularDataset.open(tmp_path / "many").read_row_group(0)
    assert rows.ids_BH[0].tolist() == KNOWN


@pytest.mark.parametrize(
    ("hots", "problem"),
    [
        ((), r"multi-hot sizes \[3, 2, .*\] for 3 columns; give one of at least 1 a column"),
        (("--hots", "3,1"), "multi-hot sizes .* for 3 columns"),
        (("--hots", "3,1,0"), "multi-hot sizes .* for 3 columns"),
    ],
)
def test_sizes_that_do_not_fit(source: Path, tmp_path: Path, hots: tuple[str, ...], problem: str) -> None:
    result = prepare("--source", source, "--out", tmp_path / "many", *hots)
    with pytest.raises(ConfigError, match=problem):
        raise result.exception
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_wrong_calls(source: Path, tmp_path: Path) -> None:
    result = prepare("--source", source, "--out", tmp_path / "many", "--hots", "3,a")
    assert result.exit_code == 2 and "'3,a' is no list of whole numbers, like 3,1,2" in result.output
    with pytest.raises(DataError, match="none: no such folder"):
        raise prepare("--source", tmp_path / "none", "--out", tmp_path / "many").exception
    assert prepare("--source", source, "--out", tmp_path / "many", "--hots", "3,1,5").exit_code == 0
    again = prepare("--source", tmp_path / "many", "--out", tmp_path / "more", "--hots", "3,1,5")
    with pytest.raises(ConfigError, match="many: column c1 has several ids a row already; give a folder with one"):
        raise again.exception


def test_a_cut_off_part_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    part = source / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-00001.parquet: is not a whole Parquet file"):
        raise prepare("--source", source, "--out", tmp_path / "many", "--hots", "3,1,5").exception
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_tables_are_on_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not hold them: MLPerf's are 24 GB."""
    seen = []
    real = multi_hot.multi_hot_tables
    monkeypatch.setattr(multi_hot, "multi_hot_tables", lambda *given: seen.append(real(*given)) or seen[0])
    assert prepare("--source", source, "--out", tmp_path / "many", "--hots", "3,1,5").exit_code == 0
    assert all(isinstance(table, np.memmap) for table in seen[0])

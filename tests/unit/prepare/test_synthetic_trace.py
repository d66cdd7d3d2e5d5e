"""Rows drawn from a tabular folder: what stays of it, and what does not."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gr.cli.prepare import command
from gr.data.tabular import TabularDataset, TabularRows
from gr.errors import ConfigError
from gr.prepare.synthetic_trace import Trace, TraceOptions
from gr.schema import SparseColumn
from tests.support.tiny_tabular import write_tiny_tabular

ONE_ID = [SparseColumn(name=f"c{n}", cardinality=60) for n in (1, 2, 3)]
COLUMNS = (*ONE_ID, SparseColumn(name="c4", cardinality=60, hots=3))
ROWS = 4000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """c1 and c2 are missing together in a third of the rows; ids are skewed, and each comes again at once."""
    folder = write_tiny_tabular(tmp_path_factory.mktemp("data") / "source", rows=ROWS, columns=COLUMNS)
    random = np.random.default_rng(0)
    ids_BH = np.minimum(random.zipf(1.3, (ROWS, 6)), 59).astype(np.int32)
    ids_BH[random.random(ROWS) < 1 / 3, :2] = 0
    ids_BH[1::2] = ids_BH[::2]
    data = TabularDataset.open(folder)
    trace = Trace(data, TraceOptions(rows=1))
    table = trace.table(TabularRows(trace.profile.labels_B, trace.profile.dense_BN, ids_BH))
    for part in folder.glob("part-*.parquet"):
        part.unlink()
    pq.write_table(table, folder / "part-00000.parquet", row_group_size=512)
    return folder


def rows_of(folder: Path) -> TabularRows:
    data = TabularDataset.open(folder)
    groups = [data.read_row_group(index) for index in range(len(data.row_groups))]
    return TabularRows(*(np.concatenate([getattr(g, f.name) for g in groups]) for f in fields(TabularRows)))


def prepare(source: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(command, ["trace", "--source", str(source), "--out", str(out), *more])


def frequencies(ids_B: np.ndarray) -> np.ndarray:
    return np.bincount(ids_B, minlength=60) / len(ids_B)


def stack_distances(ids_B: np.ndarray) -> list[int]:
    """Distinct ids since the same one before, by the definition: positions in a list of the most recent."""
    recent: list[int] = []
    distances = []
    for one in ids_B.tolist():
        if one in recent:
            distances.append(recent.index(one))
            recent.remove(one)
        recent.insert(0, one)
    return distances


def test_skew_and_missing_groups_stay(source: Path, tmp_path: Path) -> None:
    result = prepare(source, tmp_path / "out", "--rows", "40000")
    assert result.exit_code == 0, result.exception
    before, after = rows_of(source), rows_of(tmp_path / "out")
    assert len(after.labels_B) == TabularDataset.open(tmp_path / "out").rows == 40_000
    for column in range(6):
        apart = np.abs(frequencies(after.ids_BH[:, column]) - frequencies(before.ids_BH[:, column]))
        assert apart.max() < 0.012, column  # five standard deviations of the most frequent id
    missing = after.ids_BH[:, :2] == 0
    assert (missing[:, 0] == missing[:, 1]).all() and abs(missing[:, 0].mean() - 1 / 3) < 0.03
    assert abs(after.labels_B.mean() - before.labels_B.mean()) < 0.015
    apart = np.corrcoef(after.ids_BH[:-1, 2], after.ids_BH[1:, 2])[0, 1]
    assert abs(apart) < 0.03, "rows are independent"


def test_the_ids_of_a_list_stay_together(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "out", "--rows", "500").exit_code == 0
    known = set(map(tuple, rows_of(source).ids_BH[:, 3:].tolist()))
    assert set(map(tuple, rows_of(tmp_path / "out").ids_BH[:, 3:].tolist())) <= known


def test_blocks_keep_rows_and_how_soon_ids_come_again(source: Path, tmp_path: Path) -> None:
    for name, block in (("rows", "1"), ("runs", "200")):
        assert prepare(source, tmp_path / name, "--rows", "4000", "--block", block).exit_code == 0
    before, rows, runs = (rows_of(folder).ids_BH for folder in (source, tmp_path / "rows", tmp_path / "runs"))
    assert set(map(tuple, runs.tolist())) <= set(map(tuple, before.tolist()))
    for column in (0, 2):
        wanted, kept, lost = (np.mean(np.array(stack_distances(ids[:, column])) == 0) for ids in (before, runs, rows))
        assert abs(kept - wanted) < 0.05 and lost < wanted - 0.15, (wanted, kept, lost)


def test_a_seed_gives_the_same_folder_and_another_does_not(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert prepare(source, tmp_path / name, "--rows", "600", "--seed", seed).exit_code == 0
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b and a["part-00000.parquet"] != c["part-00000.parquet"]


def test_wrong_options(source: Path, tmp_path: Path) -> None:
    for arguments, problem in [
        (("--rows", "0"), "rows=0: must be at least 1; set rows higher"),
        (("--profile-rows", "100", "--block", "101"), "block=101: the profile has 100 rows; set block to so many"),
    ]:
        error = prepare(source, tmp_path / "out", *arguments).exception
        assert isinstance(error, ConfigError) and problem in str(error)
    assert not any(tmp_path.iterdir())

"""`gr prepare criteo` on small files as published, against a plain statement of what it must write."""

import gzip
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from gr.cli.prepare import command
from gr.data.tabular import TabularDataset
from gr.errors import ConfigError, DataError
from gr.prepare import lines
from gr.prepare.criteo import CriteoOptions, prepare_criteo
from gr.prepare.criteo_rows import DENSE, SPARSE, find_sources

Row = tuple[str, ...]


def random_rows(seed: int, count: int) -> list[Row]:
    chosen = random.Random(seed)
    rows = []
    for _ in range(count):
        counts = [str(chosen.choice((0, 1, 2, 7, 40, 12345))) if chosen.random() < 0.8 else "" for _ in DENSE]
        counts[1] = str(chosen.choice((-3, -2, -1, 0, 5, 2**31 - 1)))
        categories = [
            f"{chosen.randrange(1 + 3 * n) * 2654435761 % 2**32:08x}" if chosen.random() < 0.9 else ""
            for n in range(len(SPARSE))
        ]
        rows.append((str(chosen.randrange(2)), *counts, *categories))
    return rows


def text(rows: list[Row], end: str = "\n") -> bytes:
    return "".join("\t".join(row) + end for row in rows).encode()


def prepare(source: object, out: Path, *more: str) -> Result:
    return CliRunner().invoke(command, ["criteo", "--source", str(source), "--out", str(out), *more])


def table(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("part-*.parquet")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected_ids(rows: list[Row], column: int, threshold: int) -> dict[str, int]:
    counts = Counter(row[14 + column] for row in rows if row[14 + column])
    frequent = sorted((value for value, times in counts.items() if times >= threshold), key=lambda v: int(v, 16))
    return {value: number for number, value in enumerate(frequent, 1)}


@pytest.mark.parametrize("threshold", [1, 4])
def test_rows_as_stated(tmp_path: Path, threshold: int) -> None:
    rows = random_rows(1, 300)
    (tmp_path / "train.txt").write_bytes(text(rows))
    result = prepare(tmp_path / "train.txt", tmp_path / "out", "--threshold", str(threshold))
    assert result.exit_code == 0, result.exception
    written, schema = table(tmp_path / "out"), TabularDataset.open(tmp_path / "out").schema
    assert written.column("label").to_pylist() == [int(row[0]) for row in rows]
    for place, name in enumerate(DENSE, 1):
        expected = [math.log(max(int(row[place] or 0), 0) + 1) for row in rows]
        np.testing.assert_allclose(written.column(name).to_numpy(), expected, rtol=1e-7)
    for place, column in enumerate(schema.sparse):
        ids = expected_ids(rows, place, threshold)
        assert column.cardinality == len(ids) + 1
        assert written.column(column.name).to_pylist() == [ids.get(row[14 + place], 0) for row in rows]
        vocabulary = pq.read_table(tmp_path / "out" / "vocabulary" / f"{column.name}.parquet")
        assert [f"{value:08x}" for value in vocabulary.column("value").to_pylist()] == list(ids)
        assert min(vocabulary.column("count").to_pylist(), default=threshold) >= threshold
    negative = sum(row[2].startswith("-") for row in rows)
    assert schema.rows == 300 and schema.threshold == threshold and schema.negative_counts == {"i2": negative}
    assert f"negative counts, taken as 0: i2 {negative}" in result.output and "bad rows" not in result.output


def test_torchrec_minshift_is_per_file_and_a_missing_count_is_0(tmp_path: Path) -> None:
    files = [random_rows(2, 50), [(*row[:2], "4", *row[3:]) for row in random_rows(3, 40)]]
    for day, rows in enumerate(files):
        (tmp_path / f"day_{day}").write_bytes(text(rows))
    assert prepare(tmp_path, tmp_path / "out", "--transform", "torchrec_minshift").exit_code == 0
    written = np.stack([table(tmp_path / "out").column(name).to_numpy() for name in DENSE], axis=1)
    counts = [np.array([[int(field or 0) for field in row[1:14]] for row in rows], dtype=np.int64) for rows in files]
    expected = np.concatenate([np.log(c - c.min() + 2, dtype=np.float32) for c in counts])  # as tsv_to_npys does
    np.testing.assert_allclose(written, expected, rtol=3e-7)
    schema = TabularDataset.open(tmp_path / "out").schema
    assert [file.minimum for file in schema.files] == [-3, 0] and schema.transform.name == "torchrec_minshift"


def test_packaging_of_the_lines_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(4, 200)
    forms = {
        "plain": text(rows),
        "windows": text(rows, "\r\n"),
        "unfinished": text(rows)[:-1],
        "zipped": gzip.compress(text(rows[:90])) + gzip.compress(text(rows[90:])),  # two members
    }
    for name, content in forms.items():
        folder = tmp_path / name
        folder.mkdir()
        file = folder / ("train.txt.gz" if name == "zipped" else "train.txt")
        file.write_bytes(content)
        monkeypatch.setattr(lines, "BLOCK_BYTES", 1000 if name == "plain" else 1 << 20)
        assert prepare(folder, tmp_path / f"{name}-out").exit_code == 0
    tables = [table(tmp_path / f"{name}-out") for name in forms]
    assert all(each.equals(tables[0]) for each in tables)


def test_values_beyond_max_rows_share_ids(tmp_path: Path) -> None:
    rows = random_rows(5, 200)
    (tmp_path / "day_0").write_bytes(text(rows))
    assert prepare(tmp_path / "day_0", tmp_path / "whole").exit_code == 0
    assert prepare(tmp_path / "day_0", tmp_path / "folded", "--max-rows", "20").exit_code == 0
    assert prepare(tmp_path / "day_0", tmp_path / "given", "--vocabulary", str(tmp_path / "folded")).exit_code == 0
    whole, folded = (TabularDataset.open(tmp_path / name) for name in ("whole", "folded"))
    assert [c.cardinality for c in folded.schema.sparse] == [min(c.cardinality, 20) for c in whole.schema.sparse]
    ids_BC = whole.read_row_group(0).ids_BH
    expected = np.where(ids_BC > 0, (ids_BC - 1) % 19 + 1, 0)
    np.testing.assert_array_equal(folded.read_row_group(0).ids_BH, expected)
    assert contents(tmp_path / "given") | {"schema.json": b""} == contents(tmp_path / "folded") | {"schema.json": b""}


def test_ids_of_a_given_vocabulary(tmp_path: Path) -> None:
    rows, later = random_rows(5, 100), random_rows(6, 100)
    (tmp_path / "day_0").write_bytes(text(rows))
    (tmp_path / "day_1").write_bytes(text(later))
    assert prepare(tmp_path / "day_0", tmp_path / "train", "--threshold", "2").exit_code == 0
    given = ("--vocabulary", str(tmp_path / "train"))
    assert prepare(tmp_path / "day_1", tmp_path / "test", *given).exit_code == 0
    for place, name in enumerate(SPARSE):
        ids = expected_ids(rows, place, 2)
        assert table(tmp_path / "test").column(name).to_pylist() == [ids.get(row[14 + place], 0) for row in later]
    train, test = (TabularDataset.open(tmp_path / name).schema for name in ("train", "test"))
    assert (test.sparse, test.threshold, test.transform) == (train.sparse, 2, train.transform)
    assert contents(tmp_path / "train" / "vocabulary") == contents(tmp_path / "test" / "vocabulary")
    for more, message in [
        (("--threshold", "3"), "contradict each other"),
        (("--max-rows", "3"), "has max-rows None; pass one of them"),
        (("--transform", "torchrec_minshift"), "one model needs one transform"),
    ]:
        failed = prepare(tmp_path / "day_1", tmp_path / "other", *given, *more).exception
        assert isinstance(failed, ConfigError) and message in str(failed)
    file = tmp_path / "train" / "vocabulary" / "c7.parquet"
    for values, numbers, message in [([5, 3], [1, 2], "values must ascend"), ([3, 5], [1, 3], "ids must be 1, 2")]:
        pq.write_table(pa.table({"value": pa.array(values, pa.uint32()), "id": numbers}), file)
        failed = prepare(tmp_path / "day_1", tmp_path / "other", *given).exception
        assert isinstance(failed, DataError) and f"c7.parquet: {message}" in str(failed)
    file.unlink()
    failed = prepare(tmp_path / "day_1", tmp_path / "other", *given).exception
    assert isinstance(failed, DataError) and "c7.parquet: cannot be read" in str(failed)


def changed(row: Row, place: int, field: str) -> Row:
    return (*row[:place], field, *row[place + 1 :])


BASE = changed(random_rows(7, 1)[0], 0, "1")
FAULTS = [
    ("fields", BASE[:-1], "has 39 fields, wanted 40"),
    ("fields", (*BASE, "x"), "has 41 fields"),
    ("fields", ("0",), "has 1 fields"),
    (
        "fields",
        (",".join(BASE),),
        "has 1 fields, wanted 40 (label, 13 counts, 26 categories); its separator is a comma",
    ),
    ("label", changed(BASE, 0, "2"), "label is '2', allowed are 0 and 1"),
    ("label", changed(BASE, 0, ""), "label is ''"),
    ("label", changed(BASE, 0, "nan"), "label is 'nan'"),
    ("count", changed(BASE, 2, "-4"), "i2 is '-4', wanted a whole number from -3"),
    ("count", changed(BASE, 5, "1.5"), "i5 is '1.5'"),
    ("count", changed(BASE, 5, "0x1f"), "i5 is '0x1f'"),
    ("count", changed(BASE, 5, " 5"), "i5 is ' 5'"),
    ("count", changed(BASE, 5, "2147483648"), "i5 is '2147483648'"),
    ("category", changed(BASE, 14, "0123456g"), "c1 is '0123456g', wanted 8 hexadecimal digits"),
    ("category", changed(BASE, 39, "012345678"), "c26 is '012345678'"),
    ("category", changed(BASE, 39, "\xe9"), "c26 is"),
]


@pytest.mark.parametrize(("reason", "bad", "message"), FAULTS)
def test_bad_lines(tmp_path: Path, reason: str, bad: Row, message: str) -> None:
    rows = random_rows(8, 20)
    (tmp_path / "day_0").write_bytes(text(random_rows(9, 5)))
    (tmp_path / "day_1").write_bytes(text([*rows[:11], bad, *rows[11:], bad]))
    source = ("--source", str(tmp_path / "day_0"), str(tmp_path / "day_1"), "--out", str(tmp_path / "out"))
    failed = CliRunner().invoke(command, ["criteo", *source]).exception
    assert isinstance(failed, DataError) and f"day_1, line 12: {message}" in str(failed)
    assert "--on-bad-row skip" in str(failed) and "\n" not in str(failed)
    result = CliRunner().invoke(command, ["criteo", *source, "--on-bad-row", "skip"])  # goes on after day_0
    assert result.exit_code == 0 and f"bad rows left out: {reason} 2" in result.output
    good = [*random_rows(9, 5), *rows]
    for place in (0, 25):
        ids = expected_ids(good, place, 1)
        wanted = [ids.get(row[14 + place], 0) for row in good]
        assert table(tmp_path / "out").column(SPARSE[place]).to_pylist() == wanted
    schema = TabularDataset.open(tmp_path / "out").schema
    assert schema.bad_rows == {reason: 2} and [file.rows for file in schema.files] == [5, 20]


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "day_0.gz").write_bytes(gzip.compress(text(random_rows(10, 500)))[:-200])
    failed = prepare(tmp_path / "day_0.gz", tmp_path / "out").exception
    assert isinstance(failed, DataError) and "day_0.gz: cannot be read, it is damaged or cut off" in str(failed)
    (tmp_path / "train.txt").write_bytes(b"\0" * 3_000_000)
    failed = prepare(tmp_path / "train.txt", tmp_path / "out").exception
    assert isinstance(failed, DataError) and "a line, or blank lines, of more than" in str(failed)
    (tmp_path / "train.txt").write_bytes(b"")
    failed = prepare(tmp_path / "train.txt", tmp_path / "out").exception
    assert isinstance(failed, DataError) and "no row is left to write" in str(failed)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unfinished").exists()


def test_which_files(tmp_path: Path) -> None:
    for name in ("day_10", "day_2", "day_1.gz", "notes.md", "test.txt"):
        (tmp_path / name).touch()
    for places in ([str(tmp_path)], [str(tmp_path / "day_1*"), str(tmp_path / "day_2")]):
        assert [file.name for file in find_sources(places)] == ["day_1.gz", "day_2", "day_10"]
    for name in ("a.orc", "day_1"):
        (tmp_path / name).touch()
    for places, message in [
        ([str(tmp_path / "a.orc"), str(tmp_path / "day_2")], "mixes text and ORC"),
        ([str(tmp_path / "day_2"), str(tmp_path / "day_*")], "is in --source twice"),
        ([str(tmp_path / "day_1"), str(tmp_path / "day_1.gz")], "is in --source twice, perhaps once compressed"),
        ([str(tmp_path / "none")], "no such file"),
    ]:
        with pytest.raises(DataError, match=message):
            find_sources(places)


def orc_columns(rows: list[Row]) -> dict[str, pa.Array]:
    names = ["label", *DENSE, *SPARSE]
    columns = {}
    for place, name in enumerate(names):
        kind = pa.int64() if name in SPARSE else pa.float64()
        base = 16 if name in SPARSE else 10
        values = [[] if row[place] == "" else [int(row[place], base) * (10**6 if base == 16 else 1)] for row in rows]
        columns[name] = pa.array(values, pa.list_(kind))
    return columns


def test_orc_rows_are_those_of_the_text(tmp_path: Path) -> None:
    rows = random_rows(11, 60)
    (tmp_path / "train.txt").write_bytes(text(rows))
    orc.write_table(pa.table(orc_columns(rows)), tmp_path / "rows.orc")
    assert prepare(tmp_path / "train.txt", tmp_path / "text").exit_code == 0
    assert prepare(tmp_path / "rows.orc", tmp_path / "orc").exit_code == 0
    assert table(tmp_path / "orc").equals(table(tmp_path / "text"))
    failed = prepare(tmp_path / "train.txt", tmp_path / "other", "--vocabulary", str(tmp_path / "orc")).exception
    assert isinstance(failed, DataError) and "values of type int64, the source's are uint32" in str(failed)


@pytest.mark.parametrize(
    ("column", "row", "values", "reason", "message"),
    [
        ("c3", 5, [1, 2], "fields", "row 5: c3 holds 2 values, wanted 0 or 1"),
        ("label", 5, [], "fields", "row 5: label holds 0 values, wanted 1"),
        ("label", 5, [float("nan")], "label", "row 5: label is nan, allowed are 0 and 1"),
        ("i4", 5, [-4.0], "count", "row 5: i4 is -4.0, wanted a whole number from -3"),
        ("i4", 5, [0.5], "count", "row 5: i4 is 0.5"),
        ("i4", 5, [None], "fields", "row 5: i4 holds a null"),
    ],
)
def test_bad_orc_rows(tmp_path: Path, column: str, row: int, values: list, reason: str, message: str) -> None:
    columns = orc_columns(random_rows(12, 10))
    lists = columns[column].to_pylist()
    lists[row] = values
    orc.write_table(pa.table(columns | {column: pa.array(lists, columns[column].type)}), tmp_path / "bad.orc")
    failed = prepare(tmp_path / "bad.orc", tmp_path / "out").exception
    assert isinstance(failed, DataError) and message in str(failed)
    result = prepare(tmp_path / "bad.orc", tmp_path / "out", "--on-bad-row", "skip")
    assert result.exit_code == 0 and f"bad rows left out: {reason} 1" in result.output
    assert table(tmp_path / "out").num_rows == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c27": pa.array([[1]] * 3)}, "unknown column c27"),
        ({"c26": None}, "has no column c26"),
        ({"c26": pa.array([1, 2, 3])}, "column c26 has type int64, wanted list<int64>"),
    ],
)
def test_orc_columns(tmp_path: Path, change: dict, message: str) -> None:
    changed_columns = orc_columns(random_rows(13, 3)) | change
    columns = {name: column for name, column in changed_columns.items() if column is not None}
    orc.write_table(pa.table(columns), tmp_path / "bad.orc")
    failed = prepare(tmp_path / "bad.orc", tmp_path / "out").exception
    assert isinstance(failed, DataError) and message in str(failed)


def test_parts(tmp_path: Path) -> None:
    for day in range(2):
        (tmp_path / f"day_{day}").write_bytes(text(random_rows(day, 25)))
    assert prepare(tmp_path, tmp_path / "out", "--rows-per-part", "10").exit_code == 0
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert [pq.read_metadata(part).num_rows for part in parts] == [10, 10, 5, 10, 10, 5]
    assert prepare(tmp_path, tmp_path / "whole").exit_code == 0
    assert table(tmp_path / "out").equals(table(tmp_path / "whole"))


# Kills itself at the n-th call of a function of the module.
KILLED = """
import os, signal, sys
from gr.prepare import criteo
owner, name = {"note": (criteo, "write_json"), "group": (criteo.PartWriter, "_write_group")}[sys.argv[1]]
function, calls = getattr(owner, name), iter(range(int(sys.argv[2])))
def killing(*arguments):
    result = function(*arguments)
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, killing)
from gr.cli import main
main(["prepare", "criteo", "--source", sys.argv[3], "--out", sys.argv[4], "--rows-per-part", "20"])
"""


@pytest.mark.parametrize(("where", "calls"), [("note", 1), ("note", 2), ("group", 1), ("group", 4), ("note", 5)])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, where: str, calls: int) -> None:
    source, out, once = tmp_path / "raw", tmp_path / "out", tmp_path / "once"
    source.mkdir()
    for day in range(3):
        (source / f"day_{day}").write_bytes(text(random_rows(20 + day, 50)))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(calls), str(source), str(out)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists() and (tmp_path / ".out.unfinished").is_dir()
    failed = prepare(source, out, "--rows-per-part", "30").exception
    assert isinstance(failed, ConfigError) and "an interrupted run had rows_per_part=20" in str(failed)
    assert prepare(source, out, "--rows-per-part", "20").exit_code == 0
    assert prepare(source, once, "--rows-per-part", "20").exit_code == 0
    assert contents(out) == contents(once)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "out", "raw"]


def test_a_source_that_changes_under_an_interrupted_run(tmp_path: Path) -> None:
    for day in range(2):
        (tmp_path / f"day_{day}").write_bytes(text(random_rows(day, 10)))
    bad = text([*random_rows(1, 10), changed(BASE, 0, "7")])
    (tmp_path / "day_1").write_bytes(bad)
    assert "line 11" in str(prepare(tmp_path, tmp_path / "out").exception)
    (tmp_path / "day_0").write_bytes(text(random_rows(30, 11)))
    failed = prepare(tmp_path, tmp_path / "out").exception
    assert isinstance(failed, DataError) and "day_0: changed after it was read; pass --restart" in str(failed)
    (tmp_path / "day_1").write_bytes(text(random_rows(1, 10)))
    assert prepare(tmp_path, tmp_path / "out", "--restart").exit_code == 0
    assert table(tmp_path / "out").num_rows == 21


def test_rows_left_out_before_an_interruption_are_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(text([*random_rows(0, 10), changed(BASE, 0, "7")]))
    (tmp_path / "day_1.gz").write_bytes(b"damaged")
    assert "day_1.gz" in str(prepare(tmp_path, tmp_path / "out", "--on-bad-row", "skip").exception)
    failed = prepare(tmp_path, tmp_path / "out").exception
    assert isinstance(failed, DataError) and "bad rows were left out of it before the interruption" in str(failed)


def test_out_is_replaced_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_bytes(text(random_rows(0, 10)))
    assert prepare(tmp_path / "day_0", tmp_path / "out").exit_code == 0
    assert "pass --force to replace it" in str(prepare(tmp_path / "day_0", tmp_path / "out").exception)
    assert prepare(tmp_path / "day_0", tmp_path / "out", "--force").exit_code == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    assert "is no data folder" in str(prepare(tmp_path / "day_0", tmp_path / "thesis", "--force").exception)


@pytest.mark.slow
@pytest.mark.data
def test_public_rows(test_data: Path, tmp_path: Path) -> None:
    """70,000 rows of Terabyte, facts of them known beforehand; and Kaggle's, whose I2 is negative."""
    sources = find_sources([str(test_data / "criteo" / "terabyte-part-*.orc")])
    schema = prepare_criteo(sources, tmp_path / "orc", CriteoOptions())
    labels = table(tmp_path / "orc").column("label").to_numpy()
    assert schema.rows == 70_000 and abs(labels.mean() - 0.0316) < 0.0005
    sizes = {column.name: column.cardinality - 1 for column in schema.sparse}
    rows = pa.concat_tables(orc.ORCFile(str(file)).read() for file in sources)
    assert sizes == {name: len(rows.column(name).combine_chunks().flatten().unique()) for name in SPARSE}
    lines = (test_data / "criteo" / "kaggle_train.tiny.csv").read_text().splitlines()[1:]
    (tmp_path / "train.txt").write_text("".join("\t".join(line.split(",")[1:]) + "\n" for line in lines))
    schema = prepare_criteo([tmp_path / "train.txt"], tmp_path / "kaggle", CriteoOptions())
    assert schema.rows == 1999 and set(schema.negative_counts) == {"i2"} and schema.files[0].minimum == -2

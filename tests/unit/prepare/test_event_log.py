"""Logs in every common format and kind of id and time; and files that are none."""

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.api import prepare_events
from gr.cli import main
from gr.data.vocabulary import Vocabulary
from gr.errors import ConfigError, DataError
from gr.prepare.event_log import find_files
from gr.schema import DataSchema
from tests.support.own_log import LOG, TIMED, decoded, prepared, refusal


def zstd(text: str) -> bytes:
    return pa.compress(text.encode(), "zstd", asbytes=True)


def by_duckdb(file: Path) -> Path:
    duckdb.from_arrow(pa.Table.from_pandas(LOG)).write_parquet(str(file))
    return file


def written(file: Path, content: bytes | str) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def saved(write: Callable[[Path], Any], file: Path) -> Path:
    write(file)
    return file


FORMATS: dict[str, Callable[[Path], Any]] = {
    "polars": lambda folder: pl.from_pandas(LOG),
    "arrow": lambda folder: pa.Table.from_pandas(LOG),
    "categories": lambda folder: LOG.astype({"u": "category", "i": "category", "f": "category"}),
    "parquet of pandas": lambda folder: saved(LOG.to_parquet, folder / "a.parquet"),
    "parquet of polars": lambda folder: saved(pl.from_pandas(LOG).write_parquet, folder / "a.parquet"),
    "parquet of arrow": lambda folder: saved(
        lambda f: pq.write_table(pa.Table.from_pandas(LOG), f), folder / "a.parquet"
    ),
    "parquet of duckdb": lambda folder: by_duckdb(folder / "a.parquet"),
    "csv with an index": lambda folder: saved(LOG.to_csv, folder / "a.csv"),
    "semicolons": lambda folder: written(folder / "a.txt", LOG.to_csv(sep=";", index=False)),
    "tsv of windows": lambda folder: written(
        folder / "a.tsv", LOG.to_csv(sep="\t", index=False, lineterminator="\r\n")
    ),
    "byte order mark": lambda folder: written(folder / "a.csv", "\ufeff" + LOG.to_csv(index=False)),
    "csv.gz": lambda folder: written(folder / "a.csv.gz", gzip.compress(LOG.to_csv(index=False).encode())),
    "tsv.zst": lambda folder: written(folder / "a.tsv.zst", zstd(LOG.to_csv(sep="\t", index=False))),
    "json lines": lambda folder: saved(lambda f: LOG.to_json(f, orient="records", lines=True), folder / "a.jsonl"),
    "two files": lambda folder: [
        written(folder / "part-2.csv", LOG[:2].to_csv(index=False)),
        written(folder / "part-10.csv", LOG[2:].to_csv(index=False)),
    ],
    "folder": lambda folder: [FORMATS["two files"](folder), written(folder / "_SUCCESS", ""), folder][-1],
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "log").mkdir()
    source = FORMATS[name](tmp_path / "log")
    options = {**TIMED, "features": ("f",), "rating": "x", "actions": ("l",)}
    expected, mine = prepared(tmp_path / "a", LOG, **options), prepared(tmp_path / "b", source, **options)
    assert decoded(mine) == decoded(expected)
    assert pq.read_table(mine / "part-00000.parquet").equals(pq.read_table(expected / "part-00000.parquet"))
    for file in ("item_id", "user_id", "f"):
        path = f"vocabulary/{file}.parquet"
        assert pq.read_table(mine / path).equals(pq.read_table(expected / path))


IDS: dict[str, tuple[Any, list[Any]]] = {
    "text": (["007", "7", "7", "x'; --", ""], ["007", "7", "7", "x'; --", ""]),
    "int8": (np.array([-1, 2, 2, 3, 4], dtype=np.int8), [-1, 2, 2, 3, 4]),
    "uint64": (np.array([1, 2, 2, 3, 2**63 - 1], dtype=np.uint64), [1, 2, 2, 3, 2**63 - 1]),
    "whole floats": ([1.0, 2.0, 2.0, 3.0, 2.0**53], [1, 2, 2, 3, 2**53]),
    "categories of numbers": (pd.Categorical([10, 9, 9, 30, 4]), [10, 9, 9, 30, 4]),
    "booleans": ([True, False, False, True, True], [1, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids(tmp_path: Path, kind: str) -> None:
    raw, expected = IDS[kind]
    folder = prepared(tmp_path / "o", LOG.assign(i=raw), keep_duplicates=True, **TIMED)
    by_time = sorted(zip(LOG.u, LOG.t, range(len(LOG)), expected, strict=True))
    items = [item for columns in decoded(folder).values() for item in columns["item_ids"]]
    assert items == [item for *_, item in by_time]


@pytest.mark.parametrize(
    "raw, fault",
    [
        ([0.5, 1, 2, 3, 4], "column i: 0.5 is no whole number up to 2^53; write ids as integers or text"),
        (np.array([1, 2, 3, 4, 2**63], dtype=np.uint64), "column i: 9223372036854775808 is beyond int64"),
        (pd.to_datetime(LOG.t, unit="s"), "column i: has type TIMESTAMP, wanted whole numbers or text"),
        ([b"a"] * 5, "column i: has type BLOB, wanted whole numbers or text"),
        ([1, "x", 2, 3, 4], "the table: is of mixed kinds"),
        (np.array([1, 2, 3, 4, 2**24 + 2], dtype=np.float32), "column i: 16777218.0 is no whole number up to 2^24"),
    ],
)
def test_values_that_are_no_ids(tmp_path: Path, raw: Any, fault: str) -> None:
    assert fault in refusal(tmp_path, LOG.assign(i=raw), **TIMED)


def test_ids_that_arrow_has_and_pandas_lacks(tmp_path: Path) -> None:
    """Infinity, and decimals, which hold every whole number."""
    log = pa.Table.from_pandas(LOG)

    def with_items(values: pa.Array) -> pa.Table:
        return log.set_column(1, "i", values)

    fault = refusal(tmp_path, with_items(pa.array([1.0, float("inf"), 2.0, 3.0, 4.0])), **TIMED)
    assert fault == "column i: inf is no whole number up to 2^53; write ids as integers or text"
    most = pa.array([2**63 - 1, 2**53 + 1, 3, 4, 5]).cast(pa.decimal128(20, 0))
    folder = prepared(tmp_path / "o", with_items(most), **TIMED)
    items = Vocabulary.open(folder, DataSchema.load(folder), "item_id").values_V
    assert items is not None and items.to_pylist() == [3, 4, 5, 2**53 + 1, 2**63 - 1]
    beyond = pa.array([Decimal(2**63), Decimal(1), Decimal(2), Decimal(3), Decimal(4)])
    assert f"column i: {2**63} is no whole number up to 2^63" in refusal(tmp_path, with_items(beyond), **TIMED)


DATES = pd.to_datetime(LOG.t * 1000 + 7, unit="ms")
TIMES: dict[str, Any] = {
    **{f"datetime64[{unit}]": DATES.astype(f"datetime64[{unit}]") for unit in ("ms", "us", "ns")},
    "with a zone": DATES.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"),
    "text": DATES.dt.strftime("%Y-%m-%dT%H:%M:%S.%f"),
    "text, UTC": DATES.dt.strftime("%Y-%m-%d %H:%M:%S.%fZ"),
    "text, another zone": (DATES + pd.Timedelta("2h")).dt.strftime("%Y-%m-%dT%H:%M:%S.%f+02:00"),
}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("kind", TIMES)
def test_dates(tmp_path: Path, kind: str, as_text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    log = LOG.assign(t=TIMES[kind])
    source = written(tmp_path / "log.csv", log.to_csv(index=False)) if as_text else log
    folder = prepared(tmp_path / "o", source, user="u", item="i", time="t")
    assert times(folder) == sorted(LOG.t * 1000 + 7)


def test_days(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "o", LOG.assign(t=DATES.dt.date), user="u", item="i", time="t")
    assert set(times(folder)) == {1_699_920_000_000}


def times(folder: Path) -> list[int]:
    """The times as written, of all users."""
    return sorted(
        time for row in pq.read_table(folder / "part-00000.parquet")["timestamps"].to_pylist() for time in row
    )


UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@pytest.mark.parametrize("kind", ["int64", "float64", "text"])
@pytest.mark.parametrize("unit", UNITS)
def test_numbers_have_a_unit_that_is_confirmed(tmp_path: Path, unit: str, kind: str) -> None:
    per = UNITS[unit]
    late = per - 1 if kind != "float64" else 0  # one below the next second: nothing is rounded up
    log = LOG.assign(t=(LOG.t * per + late).astype("float64" if kind == "float64" else "int64"))
    source = written(tmp_path / "log.csv", log.to_csv(index=False)) if kind == "text" else log
    folder = prepared(tmp_path / "o", source, user="u", item="i", time="t", time_unit=unit)
    scale = 1 if unit == "s" else 1000
    assert times(folder) == sorted(LOG.t * scale + late * scale // per)
    columns = {"user": "u", "item": "i", "time": "t"}
    assert f"look like {unit} (years 1990 to 2100); confirm with --time-unit {unit}" in refusal(
        tmp_path, source, **columns
    )
    other = "ms" if unit != "ms" else "s"
    assert f"in {unit}, not in {other}; set --time-unit {unit}" in refusal(tmp_path, source, time_unit=other, **columns)


@pytest.mark.parametrize("as_text", [False, True])
def test_relative_times_and_fractions(tmp_path: Path, as_text: bool) -> None:
    log = LOG.assign(t=[0.3, -1.5, 2.7004, 5, 1_000])
    source = written(tmp_path / "log.csv", log.to_csv(index=False)) if as_text else log
    assert times(prepared(tmp_path / "o", source, **TIMED)) == [-1500, 300, 2700, 5000, 1_000_000]
    assert "are no dates of 1990 to 2100 in any unit" in refusal(tmp_path, source, user="u", item="i", time="t")


@pytest.mark.parametrize(
    "raw, fault",
    [
        (["x", "1", "2", "3", "4"], "column t: 'x' is neither a number nor a date like 2026-11-28T12:00:00"),
        (["2026-01-01", "1", "2", "3", "4"], "column t: has dates and numbers, such as"),
        (["infinity", "1", "2", "3", "4"], "column t: 'infinity' is neither a number nor a date"),
        (
            [1_700_000_000_000, 1_700_000_001, 3 * 10**9, 4 * 10**9, 4 * 10**9],
            "are dates of 1990 to 2100 in s and in ms",
        ),
        ([np.inf, 1, 2, 3, 4], "column t: has values that are not finite"),
        ([2**62, 1, 2, 3, 4], "do not fit int64 milliseconds"),
        ([True] * 5, "column t: has type BOOLEAN, wanted numbers or dates"),
    ],
)
def test_values_that_are_no_times(tmp_path: Path, raw: list[Any], fault: str) -> None:
    assert fault in refusal(tmp_path, LOG.assign(t=raw), **TIMED)


@pytest.mark.parametrize(
    ("unit", "last"), [("s", 253_402_300_800), ("ms", 253_402_300_800_000), (None, datetime(9999, 12, 31))]
)
def test_times_that_training_would_refuse(tmp_path: Path, unit: str | None, last: Any) -> None:
    """From the year 10000 on; the last day before it is a time."""
    log = LOG[:2].assign(t=[0, last] if unit else pd.Series(np.array([0, 0], "datetime64[us]")))
    if unit is None:
        days = pa.array([0, 253_402_300_799], pa.timestamp("s")).cast(pa.timestamp("us"))
        table = pa.Table.from_pandas(log).drop("t").append_column("t", days)
        assert prepared(tmp_path / "o", table, user="u", item="i", time="t")
        table = table.drop("t").append_column("t", pa.array([0, 253_402_300_800], pa.timestamp("s")))
        said = refusal(tmp_path, table, user="u", item="i", time="t")
    else:
        said = refusal(tmp_path, log, user="u", item="i", time="t", time_unit=unit)
    assert said == "column t: has times beyond the year 9999; correct them, or name another --time-unit"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_gzip_file_with_another_checksum(tmp_path: Path, kind: str) -> None:
    text = LOG.to_csv(index=False) if kind == "csv" else LOG.to_json(orient="records", lines=True)
    path, whole = tmp_path / f"log.{kind}.gz", gzip.compress(text.encode())
    path.write_bytes(whole + whole if kind == "jsonl" else whole)  # also of two members
    assert prepared(tmp_path / "o", path, **TIMED)
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    assert "cannot be read, it is damaged or cut off" in refusal(tmp_path, path, **TIMED)


@pytest.mark.parametrize("column", ["u", "i", "t"])
def test_a_name_of_two_lines_is_shown_in_one(tmp_path: Path, column: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the values of that column are refused, or there is no such column."""
    name = f"{column}\nerror: x"
    refused: dict[str, Any] = {"null": [None] * 5, "lists": [[1]] * 5, "floats": [0.5] * 5, "text": ["x"] * 5}
    for kind, values in {**refused, "absent": None}.items():
        log = LOG[["u", "i", "t"]]
        log = log if values is None else log.assign(**{column: pd.Series(values)}).rename(columns={column: name})
        log.to_parquet(tmp_path / "log.parquet")
        names = {each: name if each == column else each for each in "uit"}
        options = [f"--user={names['u']}", f"--item={names['i']}", f"--time={names['t']}", "--time-unit=s", "--force"]
        code = main(
            ["prepare", "events", "--source", str(tmp_path / "log.parquet"), *options, f"--out={tmp_path / 'o'}"]
        )
        lines = capsys.readouterr().err.splitlines()
        assert code == 0 or ((code, len(lines)) == (2, 1) and "\\nerror: x" in lines[0]), (kind, lines)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_ties_keep_the_order_of_the_log(tmp_path: Path, form: str) -> None:
    """Also across files, of which part-2 comes before part-10."""
    log = pd.DataFrame({"u": "a", "i": range(100, 0, -1), "t": 1_700_000_000})
    for part, first in ((2, 0), (10, 40), (9, 20), (100, 60)):
        rows, file = log[first : first + (40 if part == 100 else 20)], tmp_path / f"part-{part}.{form}"
        rows.to_csv(file, index=False) if form == "csv" else rows.to_parquet(file)
    folder = prepared(tmp_path / "o", str(tmp_path / f"part-*.{form}"), **TIMED)
    assert decoded(folder)["a"]["item_ids"] == [*range(100, 0, -1)]


def test_files(tmp_path: Path) -> None:
    for name in ("b²3.csv", "b2.csv", "b10.csv", ".hidden.csv"):
        (tmp_path / name).touch()
    assert [file.name for file in find_files(tmp_path)] == ["b2.csv", "b10.csv", "b²3.csv"]
    with pytest.raises(DataError, match="is named twice"):
        find_files([tmp_path, tmp_path / "b2.csv"])
    (tmp_path / "c.parquet").touch()
    with pytest.raises(DataError, match="Parquet and text files; prepare one kind at a time"):
        find_files(tmp_path)
    with pytest.raises(DataError, match="an empty name of a source"):
        find_files("")
    with pytest.raises(DataError, match="no such file; name a file, a folder or a pattern"):
        find_files(str(tmp_path / "none*"))


HEADER = "u,i\n"
MANY = HEADER + "".join(f"u{row % 97},{row}\n" for row in range(30_000))
BROKEN: dict[str, tuple[str, bytes | str, str]] = {
    "too many fields": (
        "a.csv",
        "u,i\na,1\nb,2,3\n",
        "a.csv: Invalid Input Error: CSV Error on Line: 3; Original Line: b,2,3",
    ),
    "too few": ("a.csv", "u,i\na,1\nb\n", "Expected Number of Columns: 2 Found: 1"),
    "open quote": ("a.csv", 'u,i\na,1\n"b,2\n', "unterminated quote"),
    "not UTF-8": ("a.csv", "u,i\né,1\n".encode("latin1"), "a.csv: cannot be read as UTF-8 text"),
    "no bytes": ("a.csv", "", "a.csv: is empty, wanted a header line with the names of the columns"),
    "no rows": ("a.csv", HEADER, "a.csv: has no rows"),
    "a name of two lines": ("a.csv", '"u\nx",i\na,1\n', "line 1: has no column u; it has u\\nx, i"),
    "twice": ("a.csv", "u,i,u\na,1,b\n", "has more than one column u"),
    "gz cut off": (
        "a.csv.gz",
        gzip.compress(MANY.encode())[:-12],
        "a.csv.gz: cannot be read, it is damaged or cut off",
    ),
    "gz flipped": ("a.csv.gz", b"\x1f\x8b" + b"\xff" * 200, "a.csv.gz: cannot be read, it is damaged or cut off"),
    "zst cut off": ("a.csv.zst", zstd(MANY)[:-3], "a.csv.zst: cannot be read, it is damaged or cut off"),
    "no Parquet": ("a.parquet", b"hello", "too small to be a Parquet file"),
    "half a line of JSON": ("a.jsonl", '{"u":1,"i":2}\n{"u":1,', "Malformed JSON"),
    "an object": ("a.jsonl", '{"u":{"id":1},"i":2}\n', "a.jsonl: field u: '{\"id\":1}' is no single value; write one"),
    "a list": ("a.jsonl", '{"u":1,"i":[2]}\n', "field i: '[2]' is no single value"),
    "no field": ("a.jsonl", '{"u":1}\n', "a.jsonl: no row has a field i; name another column"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_broken(tmp_path: Path, name: str) -> None:
    file, content, fault = BROKEN[name]
    (tmp_path / "log").mkdir()
    assert fault in refusal(tmp_path, written(tmp_path / "log" / file, content), user="u", item="i")


def test_a_gz_that_is_cut_off_late(tmp_path: Path) -> None:
    """Past what the header is read from."""
    numbers = np.random.default_rng(0).integers(0, 1 << 60, 120_000)
    cut = gzip.compress((HEADER + "".join(f"a,{number}\n" for number in numbers)).encode(), 1)[:-9]
    fault = refusal(tmp_path, written(tmp_path / "a.csv.gz", cut), user="u", item="i")
    assert "it is damaged or cut off: Truncated" in fault


def test_damaged_parquet(tmp_path: Path) -> None:
    content = bytearray(saved(LOG.to_parquet, tmp_path / "a.parquet").read_bytes())
    for cut in (-20, len(content) // 2):
        assert "magic bytes" in refusal(tmp_path, written(tmp_path / "b.parquet", content[:cut]), **TIMED)
    content[4:40] = b"\xff" * 36
    assert "the log cannot be read" in refusal(tmp_path, written(tmp_path / "b.parquet", content), **TIMED)


def test_the_second_file_has_another_layout(tmp_path: Path) -> None:
    files = [written(tmp_path / "1.csv", "u,i\na,1\n"), written(tmp_path / "2.csv", "i,u\n1,a\n")]
    assert f"{files[1]}: its first line is not that of {files[0]}" in refusal(tmp_path, files, user="u", item="i")


@pytest.mark.parametrize(
    "name", ['a"b', "a'b; DROP TABLE log; --", "a,b", "$1 ? {x}", "ünï", "SELECT", "rowid", "user"]
)
@pytest.mark.parametrize("form", ["table", "csv", "parquet", "json"])
def test_any_name_of_a_column(tmp_path: Path, name: str, form: str) -> None:
    """Names are data: of columns, files and values."""
    log = LOG[["u", "i"]].assign(**{name: [f"{name}{row}" for row in range(5)]})
    file = tmp_path / f"{name}[0].{form}"
    if form == "json":
        written(file, "\n".join(json.dumps(row) for row in log.to_dict("records")))
    elif form != "table":
        getattr(log, f"to_{form}")(file, **({"index": False} if form == "csv" else {}))
    folder = prepared(tmp_path / "o", log if form == "table" else file, user="u", item="i", features=(name,))
    values = pq.read_table(folder / "vocabulary" / f"{name}.parquet")["value"].to_pylist()
    assert values == sorted(log[name]) and list(decoded(folder)) == ["a", "b", "c"]


@pytest.mark.parametrize("form", ["table", "csv"])
def test_columns_that_differ_in_case(tmp_path: Path, form: str) -> None:
    log = pa.table({"U": ["x", "y"], "u": ["p", "q"], "i": [1, 2]})
    source = log if form == "table" else written(tmp_path / "a.csv", log.to_pandas().to_csv(index=False))
    assert list(decoded(prepared(tmp_path / "o", source, user="u", item="i"))) == ["p", "q"]


def test_since_and_until(tmp_path: Path) -> None:
    def bound(second: int) -> str:
        return datetime.fromtimestamp(1_700_000_000 + second, UTC).isoformat()

    folder = prepared(tmp_path / "o", LOG, **TIMED, since=bound(50), until=bound(100).removesuffix("+00:00"))
    assert times(folder) == [1_700_000_000 + second for second in (50, 60, 70)]
    assert "--since yesterday: is no date like" in refusal(tmp_path, LOG, **TIMED, since="yesterday")
    assert "--since and --until need --time" in refusal(tmp_path, LOG, user="u", item="i", since="2020-01-01")


def test_little_memory_is_named(tmp_path: Path) -> None:
    log = pa.table({"u": np.arange(300_000), "i": np.arange(300_000)})
    assert "--memory 0.01 GiB is too little" in refusal(tmp_path, log, user="u", item="i", memory=0.01)


def test_options_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actions: Input should be a valid tuple; more: Unexpected keyword argument"):
        prepare_events(LOG, tmp_path / "o", user="u", item="i", actions="l", more=1)
    with pytest.raises(ConfigError, match=r"test_users: Input should be .* memory: Input should be less"):
        prepare_events(LOG, tmp_path / "o", user="u", item="i", test_users=float("nan"), memory=float("inf"))

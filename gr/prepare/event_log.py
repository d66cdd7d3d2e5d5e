"""An interaction log in a common format, as one relation in DuckDB whose types are checked.

Parquet, delimited text (.csv, .tsv, any other name; plain, .gz or .zst) with a header line, JSON lines, and any object
that exports an Arrow stream (pandas, polars, pyarrow). DuckDB keeps to a limit of memory and spills to a folder.
"""

import codecs
import csv
import glob
import io
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import PER_SECOND
from gr.data.validate import LAST_SECOND
from gr.errors import DataError
from gr.prepare.source import SourceFile, natural_order

TimeUnit = Literal["s", "ms", "us", "ns"]
WHOLE = r"0|-?[1-9][0-9]{0,17}"  # whole numbers of which int64 holds every one
_DELIMITERS = (",", "\t", ";", "|")
_LONGEST_HEADER = 1 << 20
_COMPRESSED = (".gz", ".zst")
_JSON = {".json", ".jsonl", ".ndjson"}
_DISK_FULL = ("No space left on device", "max_temp_directory_size")
_SHOWN_COLUMNS, _LONGEST_MESSAGE = 20, 1000
_PLAUSIBLE = (631_152_000, 4_102_444_800)  # seconds of 1990-01-01 and of 2100-01-01


class Column(NamedTuple):
    """sql: its type in DuckDB. text: True where it was read from text, so that numbers are still digits."""

    sql: str
    text: bool

    @property
    def is_whole(self) -> bool:
        return bool(re.fullmatch(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?", self.sql))

    @property
    def is_real(self) -> bool:
        return self.sql in ("FLOAT", "DOUBLE") or self.sql.startswith("DECIMAL")

    @property
    def is_date(self) -> bool:
        return self.sql.startswith(("TIMESTAMP", "DATE"))


@contextmanager
def database(memory_gib: float, beside: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection whose tables are in a temporary folder in `beside`. memory_gib: of DuckDB's own memory, at most.

    Raises DataError for what DuckDB cannot read or write: damaged files, a full disk, malformed lines.
    """
    folder = tempfile.mkdtemp(prefix=".events.", dir=beside)
    try:
        # Tables that live for minutes are not worth compressing, and nothing is fetched from a network.
        settings: dict[str, Any] = {
            "memory_limit": f"{memory_gib * 1024:.0f}MiB",
            "temp_directory": folder,
            "force_compression": "uncompressed",
            "preserve_insertion_order": True,  # a table that was made sorted is read in that order
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        with duckdb.connect(f"{folder}/events.db", config=settings) as con:
            con.execute("SET enable_progress_bar=false; SET TimeZone='UTC'")
            yield con
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of KeyboardInterrupt
            raise KeyboardInterrupt from None
        raise
    except duckdb.Error as error:
        if any(sign in str(error) for sign in _DISK_FULL):
            raise DataError(f"{beside}: the disk is full ({_reason(error)}); choose another --out") from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise DataError(f"--memory {memory_gib:g} GiB is too little: {_reason(error)}; allow more") from error
        raise DataError(f"the log cannot be read: {_reason(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def folder_of(con: duckdb.DuckDBPyConnection) -> str:
    """The temporary folder of a connection of `database`."""
    return str(one(con, "SELECT current_setting('temp_directory')"))


def load_log(
    con: duckdb.DuckDBPyConnection, source: Any, columns: Mapping[str, str], table: str = "log"
) -> dict[str, Column]:
    """Makes the view `table` of the named columns of a source and the place of each row; returns the columns' types.

    source: files, patterns of files, or an object with an Arrow stream. columns: name in the view -> name in the
    source. Parquet is scanned again by each query; all else is read once, into a table `table`_rows. Raises DataError
    where a file or column is not there.
    """
    rows, place, text = f"{table}_rows", "rowid", False
    if _is_table(source):
        arrow = _arrow(source)
        _require(columns.values(), arrow.column_names, "the table")
        # DuckDB does not tell U from u, so the columns get their names before it sees them.
        con.register("source_rows", pa.table([arrow.column(old) for old in columns.values()], names=list(columns)))
        con.execute(f"CREATE TABLE {rows} AS SELECT * FROM source_rows")
        con.unregister("source_rows")
    else:
        files = find_files(source)
        scan, fields, text = _scan(con, files, list(columns.values()))
        _require(columns.values(), list(fields), str(files[0]))
        chosen = ", ".join(f"{fields[old]} AS {new}" for new, old in columns.items())
        if _suffix(files[0]) == ".parquet":
            rows, place = f"(SELECT {chosen}, {_place(con, files)} AS place FROM {scan})", "place"
        else:
            con.execute(f"CREATE TABLE {rows} AS SELECT {chosen} FROM {scan}")
        if _suffix(files[0]) in _JSON:
            counts = row(con, f"SELECT count(*), {', '.join(f'count({new})' for new in columns)} FROM {rows}")
            for count, name in zip(counts[1:], columns.values(), strict=True):
                if counts[0] and not count:
                    raise DataError(f"{files[0]}: no row has a field {name}; name another column")
            for new, old in columns.items():
                value = one(con, f"SELECT any_value({new}) FROM {rows} WHERE {new} ~ '[\\[{{].*' AND json_valid({new})")
                if value is not None:
                    raise DataError(f"{files[0]}: field {old}: {value!r:.60} is no single value; write one")
    described = con.execute(f"DESCRIBE SELECT {', '.join(columns)} FROM {rows}").fetchall()
    values = ", ".join(_value(name, kind) for name, kind, *_ in described)
    con.execute(f"CREATE VIEW {table} AS SELECT {values}, {place} AS place FROM {rows}")
    return {name: Column(kind, text and kind == "VARCHAR") for name, kind, *_ in described}


def _value(name: str, kind: str) -> str:
    """SQL of a column. In floats that are ids, times, flags or categories NaN is what is missing, as in pandas."""
    number = kind not in ("FLOAT", "DOUBLE") or name == "rating" or name.startswith("value_")
    return name if number else f"nullif({name}, 'nan') AS {name}"


def _place(con: duckdb.DuckDBPyConnection, files: list[Path]) -> str:
    """SQL of the place of a row of Parquet files, counted through all of them."""
    counted = con.execute(f"SELECT file_name, num_rows FROM parquet_file_metadata({_listed(files)})").fetchall()
    rows = dict(counted)
    firsts = list(accumulate((rows[str(file)] for file in files[:-1]), initial=0))
    return f"{firsts}[file_index::BIGINT + 1] + file_row_number"


def column_names(source: Any, known: str) -> list[str]:
    """The columns of a source, in its order. known: one of them."""
    if _is_table(source):
        return list(_arrow(source).column_names)
    files = find_files(source)
    with duckdb.connect() as con:
        try:
            if _suffix(files[0]) in _JSON:
                described = con.execute(f"DESCRIBE SELECT * FROM read_json({_listed(files)})").fetchall()
                return [name for name, *_ in described]
            return list(_scan(con, files, [known])[1])
        except duckdb.Error as error:
            raise DataError(f"{files[0]}: cannot be read: {_reason(error)}") from error


def _is_table(source: Any) -> bool:
    return hasattr(source, "__arrow_c_stream__")


def _arrow(source: Any) -> pa.Table:
    try:
        return pa.table(source)
    except (pa.ArrowException, TypeError, ValueError) as error:  # the latter are of pandas and polars
        fault = "is of mixed kinds" if isinstance(error, pa.ArrowException) else "is no table of columns"
        raise DataError(f"the table: {fault}: {'; '.join(map(str, error.args))}") from None


def find_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of paths, folders and patterns, each in natural order. Raises DataError where one names no file."""
    files: list[Path] = []
    named = [source] if isinstance(source, (str, Path)) else source
    if not isinstance(named, list | tuple) or not all(isinstance(each, (str, Path)) for each in named):
        raise DataError(f"a {type(source).__name__} is no log: pass files, or a table of pandas, polars or pyarrow")
    for pattern in map(str, named):
        if not pattern:
            raise DataError("an empty name of a source: name a file, a folder or a pattern in quotes; . is this folder")
        path = Path(pattern)
        if path.is_dir():
            inside = (each for each in path.rglob("*") if each.is_file() and not _is_hidden(each.relative_to(path)))
            chosen = list(inside)
        else:
            chosen = [path] if path.is_file() else [Path(each) for each in glob.glob(pattern, recursive=True)]
        chosen = [each for each in chosen if each.is_file()]
        if not chosen:
            raise DataError(f"{pattern}: no such file; name a file, a folder or a pattern in quotes")
        files += sorted(chosen, key=natural_order)
    if repeated := {file for file in files if files.count(file) > 1}:
        raise DataError(f"{min(repeated)} is named twice; name each file once")
    kinds = {"Parquet" if _suffix(f) == ".parquet" else "JSON" if _suffix(f) in _JSON else "text" for f in files}
    if len(kinds) > 1:
        raise DataError(f"{files[0]} and others are {' and '.join(sorted(kinds))} files; prepare one kind at a time")
    return files


def time_expression(
    con: duckdb.DuckDBPyConnection, column: Column, unit: TimeUnit | None, title: str
) -> tuple[str, Literal["s", "ms"], str]:
    """SQL of log.time as whole seconds or milliseconds (int64), which of them, and a phrase that describes it.

    Numbers need a unit, which the caller confirms; dates have one. Raises DataError where the values are no times.
    """
    sql, own_unit, phrase = _time_expression(con, column, unit, title)
    # The newest time is that of the greatest value, which the statistics of Parquet tell; text is not in that order.
    rows = "log" if column.sql == "VARCHAR" else "(SELECT max(time) AS time FROM log)"
    last = one(con, f"SELECT max({sql}) FROM {rows}")
    if last is not None and last >= LAST_SECOND * (1000 if own_unit == "ms" else 1):
        raise DataError(f"{title}: has times beyond the year 9999; correct them, or name another --time-unit")
    return sql, own_unit, phrase


def _time_expression(
    con: duckdb.DuckDBPyConnection, column: Column, unit: TimeUnit | None, title: str
) -> tuple[str, Literal["s", "ms"], str]:
    if column.is_date:
        return _milliseconds("time" if "ZONE" in column.sql else "time::TIMESTAMP"), "ms", "dates, UTC"
    number = "time"
    if column.sql == "VARCHAR":
        odd = r"SELECT any_value(time) FROM log WHERE NOT regexp_full_match(time, '-?[0-9]{1,19}(\.[0-9]*)?')"
        if one(con, odd) is not None:
            # DuckDB takes words such as infinity for dates.
            no_date = "coalesce(NOT isfinite(TRY_CAST(time AS TIMESTAMPTZ)), true)"
            bad = one(con, f"{odd} AND {no_date}")
            if bad is not None:
                raise DataError(f"{title}: {bad!r} is neither a number nor a date like 2026-11-28T12:00:00")
            if (number := one(con, f"SELECT any_value(time) FROM log WHERE {no_date}")) is not None:
                raise DataError(f"{title}: has dates and numbers, such as {number}; write all as one of them")
            return _milliseconds("time::TIMESTAMPTZ"), "ms", "dates, UTC where they name no zone"
        number = "time::DECIMAL(38, 9)"
    elif column.is_real:
        if one(con, "SELECT count(*) FROM log WHERE NOT isfinite(time)"):
            raise DataError(f"{title}: has values that are not finite")
    elif not column.is_whole:
        raise DataError(f"{title}: has type {column.sql}, wanted numbers or dates")
    whole = column.is_whole or not one(con, f"SELECT count(*) FROM log WHERE {number} <> floor({number})")
    if whole:
        number = f"{number}::HUGEINT"
    first, last = row(con, f"SELECT min({number}), max({number}) FROM log")
    unit = _confirmed_unit(first, last, unit, title)
    if whole and unit == "s":
        return f"({number})::BIGINT", "s", "whole seconds"
    if unit == "s":  # a float64 of seconds is less than a millisecond off
        return f"round({number} * 1000)::BIGINT", "ms", "milliseconds, from s"
    divisor = PER_SECOND[unit] // 1000
    floor = f"({number} - ({number} % {divisor} + {divisor}) % {divisor}) // {divisor}" if whole else ""
    return f"({floor or f'floor({number} / {divisor})'})::BIGINT", "ms", f"milliseconds, from {unit}"


def _milliseconds(date: str) -> str:
    """SQL of a date as whole milliseconds, rounded down; epoch_ms rounds to the nearest, which is another order."""
    return f"epoch_us({date}) // 1000 - (epoch_us({date}) % 1000 < 0)::BIGINT"


def _confirmed_unit(first: Any, last: Any, unit: TimeUnit | None, title: str) -> TimeUnit:
    """The unit. Raises DataError where it is missing, or another one is the only one that makes dates of the values."""
    fitting = [u for u, n in PER_SECOND.items() if _is_plausible(first, n) and _is_plausible(last, n)]
    span = f"{title}: values from {first} to {last}"
    oldest, newest = ([u for u, n in PER_SECOND.items() if _is_plausible(value, n)] for value in (first, last))
    if oldest and newest and not fitting:
        raise DataError(f"{span} are dates of 1990 to 2100 in {oldest[0]} and in {newest[0]}; write all in one unit")
    if unit is None:
        guess = (
            f"look like {fitting[0]} (years 1990 to 2100)" if fitting else "are no dates of 1990 to 2100 in any unit"
        )
        raise DataError(f"{span} {guess}; confirm with --time-unit {fitting[0] if fitting else 's|ms|us|ns'}")
    if fitting and unit not in fitting:
        raise DataError(
            f"{span} are dates of 1990 to 2100 in {fitting[0]}, not in {unit}; set --time-unit {fitting[0]}"
        )
    if max(abs(first), abs(last)) >= 9_000_000_000_000_000_000 // (1000 if unit == "s" else 1):
        raise DataError(f"{span} do not fit int64 milliseconds; correct the column")
    return unit


def _is_plausible(value: Any, per_second: int) -> bool:
    return bool(_PLAUSIBLE[0] * per_second <= value <= _PLAUSIBLE[1] * per_second)


def _scan(con: duckdb.DuckDBPyConnection, files: list[Path], columns: list[str]) -> tuple[str, dict[str, str], bool]:
    """SQL that scans files in order, SQL of each column by its name, and whether the values are text."""
    if _suffix(files[0]) == ".parquet":
        # By default DuckDB takes the least and largest value of a file for those of NaN, too, and does not look.
        scan = f"read_parquet({_listed(files)}, union_by_name = true, can_have_nan = true)"
        described = con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()
        for file in files:
            _require_distinct(file, columns)
        return scan, {name: quoted(name) for name, *_ in described}, False
    for file in files:
        if file.suffix in _COMPRESSED:
            _require_whole(file)
    if _suffix(files[0]) in _JSON:
        types = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in columns)
        scan = f"read_json({_listed(files)}, format = 'newline_delimited', columns = {{{types}}})"
        return scan, {name: quoted(name) for name in columns}, True
    headers = {delimiter: _header(files[0], delimiter) for delimiter in _DELIMITERS}
    fitting = [delimiter for delimiter, names in headers.items() if set(columns) <= set(names)]
    delimiter = fitting[0] if fitting else max(_DELIMITERS, key=lambda each: len(headers[each]))
    for file in files[1:]:
        if _header(file, delimiter) != headers[delimiter]:
            raise DataError(f"{file}: its first line is not that of {files[0]}; prepare files of one layout at a time")
    names = headers[delimiter]
    types = ", ".join(f"c{place}: 'VARCHAR'" for place in range(len(names)))
    scan = (
        f"read_csv({_listed(files)}, header = true, auto_detect = false, delim = {literal(delimiter)}, quote = '\"', "
        f"escape = '\"', columns = {{{types}}}, max_line_size = {_LONGEST_HEADER})"
    )
    _require(columns, names, f"{files[0]}, line 1")
    return scan, {name: f"c{place}" for place, name in enumerate(names)}, True


def _listed(files: list[Path]) -> str:
    return "[" + ", ".join(map(literal, files)) + "]"


def _require(columns: Any, present: Sequence[str], place: str) -> None:
    for column in columns:
        if present.count(column) != 1:
            fault = "has more than one column" if column in present else "has no column"
            more = [f"{len(present):,} in all"] if len(present) > _SHOWN_COLUMNS else []
            shown = ", ".join([*present[:_SHOWN_COLUMNS], *more])
            raise DataError(f"{place}: {fault} {column}; it has {shown}"[:_LONGEST_MESSAGE])


def _require_distinct(file: Path, columns: list[str]) -> None:
    """DuckDB does not tell U from u in a Parquet file: it takes the first one, and calls the other one u_1."""
    present = pq.read_schema(file).names
    for column in columns:
        alike = [name for name in present if name.lower() == column.lower()]
        if alike not in ([], [column]):
            raise DataError(f"{file}: wanted one column {column}, has {' and '.join(alike)}; rename them in the log")


def _header(file: Path, delimiter: str) -> list[str]:
    """The fields of the first line of a text file."""
    with SourceFile(file).open() as stream:
        start = stream.read(_LONGEST_HEADER)
    if not start.strip():
        raise DataError(f"{file}: is empty, wanted a header line with the names of the columns")
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _require_whole(file: Path) -> None:
    """DuckDB takes a zstd file that was cut off for one that ends there, and does not look at the checksum of gzip."""
    with SourceFile(file).open() as stream:
        while stream.read(_LONGEST_HEADER):
            pass


def _suffix(file: Path) -> str:
    name = file.with_suffix("") if file.suffix in _COMPRESSED else file
    return name.suffix.lower()


def _is_hidden(path: Path) -> bool:
    """Spark and Hadoop leave _SUCCESS and .part.crc beside the data."""
    return any(part.startswith(("_", ".")) for part in path.parts)


def one(con: duckdb.DuckDBPyConnection, query: str) -> Any:
    return row(con, query)[0]


def row(con: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    """The one row that a query gives."""
    (only,) = con.execute(query).fetchall()
    return only


def quoted(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def literal(value: str | Path) -> str:
    """A literal; of a path, one that DuckDB does not take for a pattern."""
    text = glob.escape(str(value)) if isinstance(value, Path) else value
    return "'" + text.replace("'", "''") + "'"


def _reason(error: Exception) -> str:
    """DuckDB's message in one line, without its advice, which is for its own users."""
    lines = str(error).strip().splitlines()
    message = takewhile(lambda line: not line.startswith(("Possible", "  ", "See ", "LINE ", "Try ")), lines)
    text = "; ".join(line.strip() for line in message if line.strip())[:300]
    file = next((line.partition("file = ")[2] for line in lines if line.startswith("  file = ")), "")
    return f"{file}: {text}" if file else text

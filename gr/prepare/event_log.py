"""An interaction log in a common format, as one DuckDB table whose types are checked.

Parquet, delimited text (.csv, .tsv, any other name; plain, .gz or .zst) with a header line, JSON lines, and any object
that exports an Arrow stream (pandas, polars, pyarrow). DuckDB keeps to a limit of memory and spills to a folder.
"""

import glob
import gzip
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb
import pyarrow as pa

from gr.errors import DataError

TimeUnit = Literal["s", "ms", "us", "ns"]
PER_SECOND: dict[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
WHOLE = r"0|-?[1-9][0-9]{0,17}"  # whole numbers of which int64 holds every one
_DELIMITERS = (",", "\t", ";", "|")
_LONGEST_HEADER = 1 << 20
_JSON = {".json", ".jsonl", ".ndjson"}
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
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        with duckdb.connect(f"{folder}/events.db", config=settings) as con:
            con.execute("SET enable_progress_bar=false")
            yield con
    except duckdb.OutOfMemoryException as error:
        raise DataError(f"--memory {memory_gib:g} GiB is too little: {_first_line(error)}; allow more") from error
    except duckdb.Error as error:
        raise DataError(f"the log cannot be read: {_first_line(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_log(
    con: duckdb.DuckDBPyConnection, source: Any, columns: Mapping[str, str], table: str = "log"
) -> dict[str, Column]:
    """Makes `table` of the named columns of a source, in the order of its rows (its rowid); returns their types.

    source: files, patterns of files, or an object with an Arrow stream. columns: name in the table -> name in the
    source. Raises DataError where a file or column is not there.
    """
    chosen = ", ".join(f"{quoted(old)} AS {quoted(new)}" for new, old in columns.items())
    if hasattr(source, "__arrow_c_stream__"):
        arrow = pa.table(source)
        _require(columns.values(), arrow.column_names, "the table")
        con.register("source_rows", arrow)
        con.execute(f"CREATE TABLE {table} AS SELECT {chosen} FROM source_rows")
        con.unregister("source_rows")
        text = False
    else:
        files = find_files([source] if isinstance(source, (str, Path)) else source)
        scan, text = _scan(con, files, list(columns.values()))
        con.execute(f"CREATE TABLE {table} AS SELECT {chosen} FROM {scan}")
    described = con.execute(f"DESCRIBE {table}").fetchall()
    return {name: Column(kind, text and kind == "VARCHAR") for name, kind, *_ in described}


def column_names(source: Any) -> list[str]:
    """The columns of a source, in its order."""
    if hasattr(source, "__arrow_c_stream__"):
        return list(pa.table(source).column_names)
    file = find_files([source])[0]
    if _suffix(file) == ".parquet" or _suffix(file) in _JSON:
        with duckdb.connect() as con:
            reader = "read_parquet" if _suffix(file) == ".parquet" else "read_json"
            try:
                return [row[0] for row in con.execute(f"DESCRIBE SELECT * FROM {reader}({literal(file)})").fetchall()]
            except duckdb.Error as error:
                raise DataError(f"{file}: cannot be read: {_first_line(error)}") from error
    header = _header(file)
    return header.split(max(_DELIMITERS, key=header.count))


def find_files(patterns: Sequence[str | Path]) -> list[Path]:
    """The files of paths, folders and patterns, each in natural order. Raises DataError where one names no file."""
    files: list[Path] = []
    for pattern in map(str, patterns):
        path = Path(pattern)
        if path.is_dir():
            inside = (each for each in path.rglob("*") if each.is_file() and not _is_hidden(each.relative_to(path)))
            chosen = list(inside)
        else:
            chosen = [path] if path.is_file() else [Path(each) for each in glob.glob(pattern, recursive=True)]
        chosen = [each for each in chosen if each.is_file()]
        if not chosen:
            raise DataError(f"--source {pattern}: no such file; name a file, a folder or a pattern in quotes")
        files += sorted(chosen, key=_natural)
    if repeated := {file for file in files if files.count(file) > 1}:
        raise DataError(f"--source names {min(repeated)} twice; name each file once")
    kinds = {"Parquet" if _suffix(f) == ".parquet" else "JSON" if _suffix(f) in _JSON else "text" for f in files}
    if len(kinds) > 1:
        raise DataError(f"--source mixes {' and '.join(sorted(kinds))} files; prepare one kind at a time")
    return files


def time_expression(
    con: duckdb.DuckDBPyConnection, column: Column, unit: TimeUnit | None, title: str
) -> tuple[str, Literal["s", "ms"], str]:
    """SQL of log.time as whole seconds or milliseconds (int64), which of them, and a phrase that describes it.

    Numbers need a unit, which the caller confirms; dates have one. Raises DataError where the values are no times.
    """
    if column.is_date:
        return _milliseconds("time" if column.sql != "DATE" else "time::TIMESTAMP"), "ms", "dates, UTC"
    number = "time"
    if column.sql == "VARCHAR":
        pattern = rf"-?[0-9]{{1,18}}(\.[0-9]*)?|{WHOLE}"
        odd = one(con, f"SELECT any_value(time) FROM log WHERE NOT regexp_full_match(time, '{pattern}')")
        if odd is not None:
            bad = one(
                con, "SELECT any_value(time) FROM log WHERE time IS NOT NULL AND TRY_CAST(time AS TIMESTAMPTZ) IS NULL"
            )
            if bad is not None:
                raise DataError(f"{title}: {bad!r} is neither a number nor a date like 2026-11-28T12:00:00")
            return _milliseconds("time::TIMESTAMPTZ"), "ms", "dates, UTC where they name no zone"
        fractions = one(con, "SELECT count(*) FROM log WHERE contains(time, '.')")
        number = "time::DECIMAL(38, 9)" if fractions else "time::BIGINT"
    elif column.is_real:
        if one(con, "SELECT count(*) FROM log WHERE NOT isfinite(time)"):
            raise DataError(f"{title}: has values that are not finite")
    elif not column.is_whole:
        raise DataError(f"{title}: has type {column.sql}, wanted numbers or dates")
    first, last = row(con, f"SELECT min({number}), max({number}) FROM log")
    _confirm_unit(first, last, unit, title)
    assert unit is not None
    if unit == "s" and number in ("time", "time::BIGINT") and not column.is_real:
        return f"{number}::BIGINT", "s", "whole seconds"
    factor = PER_SECOND[unit]
    scaled = f"{number} * {1000 // factor}" if factor <= 1000 else f"{number} / {factor // 1000}"
    return f"floor({scaled})::BIGINT", "ms", f"milliseconds, from {unit}"


def _milliseconds(date: str) -> str:
    """SQL of a date as whole milliseconds, rounded down; epoch_ms rounds to the nearest, which is another order."""
    return f"(epoch_us({date}) - (epoch_us({date}) % 1000 + 1000) % 1000) // 1000"


def _confirm_unit(first: Any, last: Any, unit: TimeUnit | None, title: str) -> None:
    """Raises DataError where a unit is missing, or another one is the only one that makes dates of the values."""
    if first is None:
        return
    fitting = [u for u, n in PER_SECOND.items() if _PLAUSIBLE[0] * n <= first and last <= _PLAUSIBLE[1] * n]
    span = f"{title}: values from {first} to {last}"
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


def number_expression(con: duckdb.DuckDBPyConnection, name: str, column: Column, title: str) -> str:
    """SQL of a column of `log` as FLOAT. Raises DataError where a value is missing or no finite number."""
    bad = f"SELECT count(*) FROM log WHERE TRY_CAST({quoted(name)} AS DOUBLE) IS NULL"
    if not (column.sql == "VARCHAR" or column.is_whole or column.is_real or column.sql == "BOOLEAN"):
        raise DataError(f"{title}: has type {column.sql}, wanted numbers")
    if count := one(con, bad + f" OR NOT isfinite(TRY_CAST({quoted(name)} AS FLOAT))"):
        raise DataError(f"{title}: {count:,} values are missing or no finite numbers; correct or leave out these rows")
    return f"{quoted(name)}::DOUBLE::FLOAT"


def _scan(con: duckdb.DuckDBPyConnection, files: list[Path], columns: list[str]) -> tuple[str, bool]:
    """SQL that scans files in order, and whether their values are text."""
    listed = "[" + ", ".join(map(literal, files)) + "]"
    if _suffix(files[0]) == ".parquet":
        scan = f"read_parquet({listed}, union_by_name = true)"
        _require(columns, [row[0] for row in con.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()], str(files[0]))
        return scan, False
    if _suffix(files[0]) in _JSON:
        types = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in columns)
        return f"read_json({listed}, format = 'newline_delimited', columns = {{{types}}})", True
    header = _header(files[0])
    delimiter = next((d for d in _DELIMITERS if set(columns) <= set(_fields(header, d))), None)
    if delimiter is None:
        likely = max(_DELIMITERS, key=header.count)
        _require(columns, _fields(header, likely), f"{files[0]}, line 1")
    for file in files[1:]:
        if _header(file) != header:
            raise DataError(f"{file}: its first line is not that of {files[0]}; prepare files of one layout at a time")
    assert delimiter is not None
    types = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in _fields(header, delimiter))
    return (
        f"read_csv({listed}, header = true, auto_detect = false, delim = {literal(delimiter)}, quote = '\"', "
        f"escape = '\"', columns = {{{types}}}, new_line = '{_line_end(files[0])}', max_line_size = {_LONGEST_HEADER})"
    ), True


def _require(columns: Any, present: Sequence[str], place: str) -> None:
    for column in columns:
        if column not in present:
            raise DataError(f"{place}: has no column {column}; it has {', '.join(present)}")


def _fields(header: str, delimiter: str) -> list[str]:
    return [field.removeprefix('"').removesuffix('"') for field in header.split(delimiter)]


def _header(file: Path) -> str:
    """The first line of a text file, without its end and byte order mark."""
    try:
        line = _first_bytes(file).split(b"\n")[0]
        return line.decode("utf-8-sig").removesuffix("\r")
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{file}: its first line cannot be read as UTF-8 text ({error})") from error


def _line_end(file: Path) -> str:
    return "\\r\\n" if b"\r\n" in _first_bytes(file) else "\\n"


def _first_bytes(file: Path) -> bytes:
    if file.suffix == ".gz":
        with gzip.open(file) as stream:
            return stream.read(_LONGEST_HEADER)
    if file.suffix == ".zst":
        with pa.CompressedInputStream(pa.OSFile(str(file)), "zstd") as stream:
            return stream.read(_LONGEST_HEADER)
    with file.open("rb") as stream:
        return stream.read(_LONGEST_HEADER)


def _suffix(file: Path) -> str:
    name = file.with_suffix("") if file.suffix in (".gz", ".zst") else file
    return name.suffix.lower()


def _is_hidden(path: Path) -> bool:
    """Spark and Hadoop leave _SUCCESS and .part.crc beside the data."""
    return any(part.startswith(("_", ".")) for part in path.parts)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sorts part-2 before part-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(file))]


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

"""Answers of a model as one Parquet file, in the ids of the data's own log; and the questions, read from files.

All ranks write, each its own part; the parts are joined in the order of ranks. N rows.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import ColumnType
from gr.data.loader import dealt
from gr.data.parquet import decoding
from gr.data.validate import checked_column, require_columns
from gr.data.vocabulary import Vocabulary
from gr.dist import World
from gr.errors import ConfigError, DataError
from gr.files import is_transient

_MAGIC = b"PAR1"
_ROW_GROUP = 16 << 20  # bytes in memory of the rows of a row group


@dataclass(frozen=True)
class Listed:
    """The ids that a file names, ascending. limits_N: its column k, if any. unknown_N: values without an id."""

    ids_N: np.ndarray
    limits_N: np.ndarray | None
    unknown_N: pa.Array


def read_listed(path: Path, vocabulary: Vocabulary) -> Listed:
    """The column of a Parquet file that has the vocabulary's name, as ids; and its column k, if any.

    Raises DataError where the file has no such column, names one twice, or a k is below 1.
    """
    file = _opened(path)
    with decoding(path, "cannot be read"):
        table = file.read()
    require_columns(path, table, [vocabulary.column])
    values_N = table.column(vocabulary.column).combine_chunks()
    if pa.types.is_string_view(values_N.type):  # which Arrow does not filter
        values_N = values_N.cast(pa.string())
    ids_N, known = vocabulary.lookup(values_N)
    order = np.argsort(ids_N[known], kind="stable")
    chosen = ids_N[known][order]
    if (repeated := chosen[1:][np.diff(chosen) == 0]).size:
        raise DataError(f"{path}: {vocabulary.column} {vocabulary.values(repeated[:1])[0]} is named twice")
    limits = None
    if "k" in table.column_names:
        limits = checked_column(path, table, "k", ColumnType("id")).filled[known][order]
        if (limits < 1).any():
            raise DataError(f"{path}: column k has values below 1")
    return Listed(chosen, limits, values_N.filter(pa.array(~known)))


def read_rows(path: Path, world: World, size: int) -> tuple[pa.Schema, Iterator[tuple[str, pa.Table]]]:
    """The columns of a Parquet file, and this rank's rows in tables of `size` at most, each with its place in the file.

    Rank r has rows [r*N/R, (r+1)*N/R); all ranks get as many tables, the last ones perhaps empty.
    """
    file = _opened(path)
    bounds, tables = dealt(file.metadata.num_rows, world.size, size)

    def read() -> Iterator[tuple[str, pa.Table]]:
        first, given = 0, 0
        start, stop = bounds[world.rank], bounds[world.rank + 1]
        pending = file.schema_arrow.empty_table()
        for index in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(index).num_rows
            begin, end = max(start - first, 0), min(stop - first, count)
            first += count
            if begin >= end:
                continue
            with decoding(path):
                pending = pa.concat_tables([pending, file.read_row_group(index).slice(begin, end - begin)])
            while pending.num_rows >= size:
                yield f"{path}, rows from {start + given * size}", pending.slice(0, size)
                pending, given = pending.slice(size), given + 1
        for _ in range(tables - given):
            yield f"{path}, rows from {start + given * size}", pending
            pending = pending.slice(pending.num_rows)

    return file.schema_arrow, read()


def with_scores(table: pa.Table, schema: pa.Schema, scores: Sequence[pa.Array]) -> pa.Table:
    """A table with further columns, of `schema`."""
    return pa.table([*table.columns, *scores], schema=schema)


def scored_schema(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """The schema of a table with a float32 column for each of `names`. Raises DataError where one is there already."""
    if taken := [name for name in names if name in schema.names]:
        raise DataError(f"the input has a column {taken[0]} already; rename it, the prediction has this name")
    return pa.schema([*schema, *(pa.field(name, pa.float32()) for name in names)])


def write_answers(out: Path, schema: pa.Schema, tables: Iterable[pa.Table], world: World) -> int:
    """Writes `out` under its name once it is whole; returns the number of rows over all ranks.

    Raises ConfigError, and leaves no file, where it cannot be written. Collective.
    """
    if out.exists() and not (out.is_file() or out.is_dir()):  # a file would take the place of a device, too
        raise ConfigError(f"out={out}: is no file, so it is not replaced; name another file")
    part, rows = _part(out, world.rank), 0
    try:
        world.on_all(part.touch)
        with pq.ParquetWriter(part, schema) as writer:
            for table in _in_row_groups(tables):
                writer.write_table(table)
                rows += table.num_rows
        (total,) = world.all_reduce_sum([float(rows)])
        # No rank removes its part, or returns, before the file has its name.
        world.on_all(lambda: _join(out, schema, world.size) if world.is_main else None)
    except OSError as error:
        if is_transient(error):
            raise
        why = os.strerror(error.errno) if error.errno else error.strerror or error
        raise ConfigError(f"out={out}: cannot be written: {why}; name another file") from error
    finally:
        for left in (part, *([_whole(out)] if world.is_main else [])):
            if left.exists():
                left.unlink()
    return int(total)


def _in_row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about _ROW_GROUP bytes: a row group a batch would repeat its dictionary each time."""
    pending, size = list[pa.Table](), 0
    for table in tables:
        if table.num_rows:
            pending.append(table)
            size += table.nbytes
        if size >= _ROW_GROUP:
            yield pa.concat_tables(pending)
            pending, size = [], 0
    if pending:
        yield pa.concat_tables(pending)


def _opened(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a Parquet file")
    with path.open("rb") as start:
        if start.read(len(_MAGIC)) != _MAGIC:
            raise DataError(f"{path}: is no Parquet file; write it as one, as to_parquet of pandas does")
    with decoding(path, "cannot be read"):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: has more than one column {repeated[0]}; rename all but one")
    return file


def _whole(out: Path) -> Path:
    return out.with_name(f".{out.name}.whole")


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f".{out.name}.{rank}")


def _join(out: Path, schema: pa.Schema, ranks: int) -> None:
    """One file of the parts, one row group at a time."""
    if ranks == 1:
        _part(out, 0).rename(out)
        return
    with pq.ParquetWriter(_whole(out), schema) as writer:
        for rank in range(ranks):
            with pq.ParquetFile(_part(out, rank)) as part:
                for index in range(part.num_row_groups):
                    writer.write_table(part.read_row_group(index))
    _whole(out).rename(out)

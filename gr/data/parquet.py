"""The Parquet parts of a data folder: footers, column types and row groups."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import ColumnType
from gr.errors import DataError
from gr.files import is_transient
from gr.logging import get_logger, log_once
from gr.schema import PART_PATTERN

log = get_logger(__name__)


@dataclass(frozen=True)
class RowGroup:
    """The place of a row group. index: its place in the file; rows: its number of rows."""

    file: Path
    index: int
    rows: int

    def __str__(self) -> str:
        return f"{self.file}: row group {self.index}"


@dataclass(frozen=True)
class Parts:
    """The row groups of a folder, known from footers. Safe to read from threads."""

    row_groups: list[RowGroup]
    metadata: dict[Path, pq.FileMetaData]

    @classmethod
    def open(cls, path: Path, types: Mapping[str, ColumnType]) -> Self:
        """Reads the footers. types: columns that each part must have; others are ignored, and named in the log.

        A part without rows, as Spark writes them, is passed over. Raises DataError, naming file and column, for a
        missing part, a file that is not Parquet or was cut off, a missing column, or a type that cannot be read.
        """
        files = sorted(path.glob(PART_PATTERN))
        if not files:
            raise DataError(f"{path}: has no {PART_PATTERN}{_what_is_there(path)}; docs/data.md says what a folder has")
        row_groups, metadata = [], {}
        ignored: set[str] = set()
        for file in files:
            footer = read_footer(file)
            if footer.num_rows == 0:
                continue
            schema = footer.schema.to_arrow_schema()
            _check_types(file, schema, types)
            ignored.update(name for name in schema.names if name not in types)
            metadata[file] = footer
            row_groups += [RowGroup(file, i, footer.row_group(i).num_rows) for i in range(footer.num_row_groups)]
        if ignored:
            log_once(log, f"{path}: ignores {', '.join(sorted(ignored))}, not in schema.json", level=logging.INFO)
        if len(metadata) < len(files):
            empty = len(files) - len(metadata)
            log_once(log, f"{path}: {empty} of {len(files)} parts have no rows", level=logging.INFO)
        return cls(row_groups, metadata)

    def wrong_rows(self, path: Path, field: str, rows: int) -> Iterator[str]:
        """A fault where the parts of a folder do not hold the rows that a field of schema.json states."""
        if (total := sum(self.row_counts)) != rows:
            yield f"{path}: {len(self.metadata)} parts hold {total} rows, schema.json says {field}={rows}"

    @property
    def row_counts(self) -> list[int]:
        """Rows of each row group, in file order."""
        return [group.rows for group in self.row_groups]

    def statistics(self, column: str) -> Iterator[tuple[RowGroup, pq.ColumnChunkMetaData]]:
        """The statistics of a column in the footers, by row group."""
        place = {}
        for group in self.row_groups:
            footer = self.metadata[group.file]
            if group.file not in place:
                paths = [f"{footer.schema.column(leaf).path}." for leaf in range(footer.num_columns)]
                place[group.file] = next(leaf for leaf, path in enumerate(paths) if path.startswith(f"{column}."))
            yield group, footer.row_group(group.index).column(place[group.file])

    def read(self, index: int, columns: list[str]) -> tuple[RowGroup, pa.Table]:
        """Decodes one row group. Raises DataError where the file is damaged, OSError where another try may read it."""
        group = self.row_groups[index]
        footer = self.metadata[group.file]
        with decoding(group), pq.ParquetFile(group.file, metadata=footer, page_checksum_verification=True) as file:
            return group, file.read_row_group(group.index, columns=columns, use_threads=False)


@contextmanager
def decoding(place: Path | RowGroup, problem: str = "cannot be decoded") -> Iterator[None]:
    """Raises DataError where a file has gone or is damaged, OSError where another try may read it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{place}: the file has gone since the run began: put it back, then start again") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if is_transient(error):
            raise
        raise DataError(f"{place}: {problem}, the file is damaged or cut off: {error}") from error


def read_footer(file: Path) -> pq.FileMetaData:
    """The footer of a part. Raises DataError where the file is not whole, OSError where another try may read it."""
    with decoding(file, "is not a whole Parquet file"):
        if file.stat().st_size == 0:
            raise DataError(f"{file}: is empty (0 bytes)")
        footer = pq.read_metadata(file)
        _ = footer.schema.to_arrow_schema().names  # that they can be read
        return footer


def _check_types(file: Path, schema: pa.Schema, types: Mapping[str, ColumnType]) -> None:
    for name, column_type in types.items():
        if (count := schema.names.count(name)) != 1:
            problem = f"has {count} columns {name}" if count else f"has no column {name}, which schema.json asks for"
            raise DataError(f"{file}: {problem}; it has {', '.join(schema.names)}")
        if not column_type.reads(kind := schema.field(name).type):
            raise DataError(f"{file}: column {name} has type {kind}, wanted {column_type}")


def _what_is_there(path: Path) -> str:
    """The end of a message: other Parquet files that a folder without parts has."""
    if hive := sorted(each.name for each in path.iterdir() if each.is_dir() and "=" in each.name):
        return f", but {len(hive)} folders as {hive[0]}, which are not read: write it without partitions"
    if others := sorted(path.glob("*.parquet")):
        return f", but {len(others)} files as {others[0].name}: rename those with rows to part-00000.parquet and so on"
    return ""

"""The Parquet parts of a data folder: footers, column types and row groups."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import DataError
from gr.files import is_transient
from gr.schema import PART_PATTERN


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
    def open(cls, path: Path, types: Mapping[str, tuple[pa.DataType, ...]], *, rows: tuple[str, int]) -> Self:
        """Reads the footers. types: columns that each part must have, with the types allowed. rows: the field of
        schema.json that states the number of rows, and its value.

        Raises DataError, naming file and column, for a missing part, a file that is not Parquet or was cut off, a part
        without rows, a missing column, a wrong type, or another number of rows than the schema says.
        """
        files = sorted(path.glob(PART_PATTERN))
        if not files:
            raise DataError(f"{path}: has no {PART_PATTERN}; write the folder again with `gr prepare --force`")
        row_groups, metadata = [], {}
        for file in files:
            metadata[file] = footer = read_footer(file)
            if footer.num_rows == 0:
                raise DataError(f"{file}: has no rows; remove the file or write the folder again")
            _check_types(file, footer.schema.to_arrow_schema(), types)
            row_groups += [RowGroup(file, i, footer.row_group(i).num_rows) for i in range(footer.num_row_groups)]
        field, expected_rows = rows
        total = sum(group.rows for group in row_groups)
        if total != expected_rows:
            raise DataError(f"{path}: {len(files)} parts hold {total} rows, schema.json says {field}={expected_rows}")
        return cls(row_groups, metadata)

    @property
    def row_counts(self) -> list[int]:
        """Rows of each row group, in file order."""
        return [group.rows for group in self.row_groups]

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
    except (pa.ArrowException, OSError) as error:
        if is_transient(error):
            raise
        raise DataError(f"{place}: {problem}, the file is damaged or cut off: {error}") from error


def read_footer(file: Path) -> pq.FileMetaData:
    """The footer of a part. Raises DataError where the file is not whole, OSError where another try may read it."""
    with decoding(file, "is not a whole Parquet file"):
        if file.stat().st_size == 0:
            raise DataError(f"{file}: is empty (0 bytes)")
        return pq.read_metadata(file)


def _check_types(file: Path, schema: pa.Schema, types: Mapping[str, tuple[pa.DataType, ...]]) -> None:
    for name, allowed in types.items():
        if name not in schema.names:
            raise DataError(
                f"{file}: has no column {name}, which schema.json asks for; it has {', '.join(schema.names)}"
            )
        kind = schema.field(name).type
        plain = pa.list_(kind.value_type) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if plain not in allowed:
            raise DataError(f"{file}: column {name} has type {kind}, wanted {' or '.join(map(str, allowed))}")

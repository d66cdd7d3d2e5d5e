"""Lines of fields between separators, as columns of arrays. What is parsed is what is written: no blanks, quotes, other
notations of a number, or numbers out of their range.

T lines.
"""

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from gr.errors import DataError
from gr.prepare.lines import BadRows, Fault, parse_lines, shown, text_blocks, whole_lines
from gr.prepare.source import SourceFile

LARGEST_ID = 2**31 - 4
_WHOLE = re.compile(rb"-?\d{1,30}")
_STARS, _NAME = re.compile(r"\d(\.\d+)?"), re.compile(r"[!#-~]+")  # a name: printable ASCII without the quote
_BYTE = b"\x01"  # stands for a separator of several bytes, since Arrow takes one
# The least time in each unit: 10^11 is a day of 1973 in ms, and of the year 5138 in seconds.
_UNITS = {"s": 0, "ms": 10**11, "us": 10**14, "ns": 10**17}


# Kinds of columns. arrow: the type as which Arrow reads it. values: the column [T], ValueError where `problem` has one
# for a field that Arrow took. problem: what is wrong with a field.


@dataclass(frozen=True)
class Whole:
    """A whole number from low to high, int32 or int64."""

    low: int
    high: int

    @property
    def arrow(self) -> pa.DataType:
        return pa.int32() if self.high < 2**31 else pa.int64()

    def values(self, column: pa.ChunkedArray) -> np.ndarray:
        values_T = column.to_numpy()
        if values_T.min() < self.low or values_T.max() > self.high:
            raise ValueError("a number is out of range")
        return values_T

    def problem(self, field: bytes) -> str | None:
        if not _WHOLE.fullmatch(field):
            return f"{shown(field)} is not a whole number"
        if not self.low <= int(field) <= self.high:
            return f"is {int(field)}, allowed are {self.low} to {self.high}"
        return None


@dataclass(frozen=True)
class Time(Whole):
    """Time since 1970 in seconds or milliseconds."""

    unit: str

    def problem(self, field: bytes) -> str | None:
        if (problem := super().problem(field)) and field.isdigit() and len(field) < 20:
            actual = next(unit for unit, first in reversed(_UNITS.items()) if int(field) >= first)
            return f"is {int(field)}, which is a time in {actual}; write it in {self.unit} since 1970"
        return problem


SECONDS = Time(0, _UNITS["ms"] - 1, "s")
MILLISECONDS = Time(_UNITS["ms"], _UNITS["us"] - 1, "ms")


@dataclass(frozen=True)
class Stars:
    """A rating in steps of `step`, as in 4, 4.0 or 3.5, float32."""

    step: float
    low: float
    high: float = 5.0
    arrow = pa.dictionary(pa.int32(), pa.string())

    def values(self, column: pa.ChunkedArray) -> np.ndarray:
        column = column.unify_dictionaries()
        stars = np.array([self._stars(text) for text in column.chunk(0).dictionary.to_pylist()], dtype=np.float32)
        return stars[np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])]

    def problem(self, field: bytes) -> str | None:
        try:
            self._stars(field.decode("ascii"))
        except ValueError:
            return f"rating is {shown(field)}, allowed are {self.low:g} to {self.high:g} in steps of {self.step:g}"
        return None

    def _stars(self, text: str) -> float:
        stars = float(text) if _STARS.fullmatch(text) else 0.0
        if not self.low <= stars <= self.high or stars % self.step:
            raise ValueError("no rating")
        return stars


@dataclass(frozen=True)
class Name:
    """Printable ASCII without blanks and quotes, as Arrow's dictionary."""

    arrow = pa.dictionary(pa.int32(), pa.string())

    def values(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if any("" in chunk.dictionary.to_pylist() for chunk in column.chunks):
            raise ValueError("a name is empty")
        return column

    def problem(self, field: bytes) -> str | None:
        if _NAME.fullmatch(field.decode("ascii", "replace")):
            return None
        return f"{shown(field)} is no name: wanted ASCII without blanks and quotes"


Field = Whole | Stars | Name


@dataclass(frozen=True)
class Lines:
    """The lines of a file. fields: those to read, by name; without a header, all fields of a line in their order.

    header: where the first line names the columns, the name of each field there; other columns are passed over.
    """

    separator: str
    fields: Mapping[str, Field]
    header: Mapping[str, str] | None = None

    def blocks(self, file: SourceFile, bad: BadRows) -> Iterator[dict[str, Any]]:
        """Columns `fields`, in file order. DataError for a header that lacks one, and bad lines as `bad` says."""
        names = list(self.fields) if self.header is None else self._named(file, self.header)
        texts = text_blocks(file, header=self.header is not None)
        first = 1 + (self.header is not None)
        parse, fault = partial(self._parse, names), partial(self._fault, names)
        yield from parse_lines(file, texts, parse, fault, bad, first=first, is_suspect=self._is_suspect)

    def read(self, file: SourceFile) -> dict[str, Any]:
        """All lines. DataError for a bad line, and where there is none."""
        blocks = list(self.blocks(file, BadRows()))
        if not blocks:
            raise DataError(f"{file}: has no events")
        return {name: _joined([block[name] for block in blocks]) for name in self.fields}

    def _named(self, file: SourceFile, header: Mapping[str, str]) -> list[str]:
        columns = header_of(file, self.separator, header)
        return [next((name for name, written in header.items() if written == column), column) for column in columns]

    def _parse(self, names: list[str], text: bytes) -> dict[str, Any]:
        """ValueError where a line may be bad."""
        separator = self.separator.encode()
        if len(separator) > 1:
            text, separator = text.replace(separator, _BYTE), _BYTE
        table = csv.read_csv(
            pa.BufferReader(text),
            csv.ReadOptions(column_names=names, block_size=len(text) + 1, use_threads=False),
            csv.ParseOptions(delimiter=separator.decode(), quote_char=False, ignore_empty_lines=False),
            csv.ConvertOptions(
                column_types={name: field.arrow for name, field in self.fields.items()},
                include_columns=list(self.fields),
                null_values=[],
                strings_can_be_null=False,
            ),
        )
        if table.num_rows != text.count(b"\n"):
            raise ValueError("a line is cut in two")
        return {name: field.values(table.column(name)) for name, field in self.fields.items()}

    def _fault(self, names: list[str], line: bytes) -> Fault | None:
        parts = line.split(self.separator.encode())
        if len(parts) != len(names) or b"\r" in line:
            wanted = "" if self.header else f" ({', '.join(names)})"
            return Fault("(fields)", f"has {len(parts)} fields, wanted {len(names)}{wanted}: {shown(line)}")
        for name, part in zip(names, parts, strict=True):
            if name in self.fields and (problem := self.fields[name].problem(part)):
                return Fault(name, problem, name)
        return None

    def _is_suspect(self, text: bytes) -> bool:
        """Whether Arrow may take for a number what is none, as it takes blanks and 0x1f."""
        separator = self.separator.encode()
        hexadecimal = any(separator + prefix in text for prefix in (b"0x", b"0X"))
        return hexadecimal or bool(text.translate(None, self._usual + separator))

    @cached_property
    def _usual(self) -> bytes:
        """Bytes that need no second look: those of numbers, and those of names where there are names."""
        if any(isinstance(field, Name) for field in self.fields.values()):
            return bytes(byte for byte in range(33, 127) if byte != ord('"')) + b"\r\n"
        return string.digits.encode() + b"-.\r\n"


def header_of(file: SourceFile, separator: str, needed: Mapping[str, str]) -> list[str]:
    """Names of the columns, from line 1. DataError where one of `needed`.values() is missing, or one is named twice."""
    with file.open() as stream:
        line = next(whole_lines(file, stream), b"").partition(b"\n")[0].removesuffix(b"\r")
    names = line.decode("utf-8", "backslashreplace").split(separator)
    if missing := [name for name in needed.values() if name not in names]:
        raise DataError(f"{file}, line 1: has no column {', '.join(missing)}; its columns are {shown(line)}")
    if twice := [name for name in needed.values() if names.count(name) > 1]:
        raise DataError(f"{file}, line 1: column {twice[0]} is named twice")
    return names


def require_dense(file: object, noun: str, largest: int, count: int) -> None:
    """DataError where ids up to `largest`, which are rows of tables, are far more than `count` rows of data can be."""
    if largest > 1_000_000 + 100 * count:
        raise DataError(
            f"{file}: the largest {noun} is {largest}, though there are only about {count} rows: each id up to it "
            "would be a row of a table; correct the line, or number the ids from 1 (as `gr prepare events` does)"
        )


def _joined(blocks: list[Any]) -> Any:
    if isinstance(blocks[0], pa.ChunkedArray):
        return pa.chunked_array([chunk for block in blocks for chunk in block.chunks])
    return np.concatenate(blocks)

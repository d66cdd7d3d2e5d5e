"""Criteo's rows, as published, -> blocks of arrays; a row that is not one is an error with its line, or counted.

Text: lines of a label, 13 counts and 26 categories of 8 hexadecimal digits, separated by tabs, empty where missing
(Kaggle's train.txt and Terabyte's day_0 to day_23, plain or .gz). ORC: the columns label, i1..i13 (double) and c1..c26
(int64), each a list of at most one value.

A count may be negative down to -3: Kaggle's I2 holds -1 to -3, Terabyte's I8 -1.

B rows of a block, P of them with a value in a column, V distinct values.
"""

import binascii
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.orc as orc

from gr.errors import DataError
from gr.logging import get_logger

log = get_logger(__name__)

LABEL = "label"
DENSE = tuple(f"i{n}" for n in range(1, 14))
SPARSE = tuple(f"c{n}" for n in range(1, 27))
LEAST_COUNT, LARGEST_COUNT = -3, 2**31 - 1
_COLUMNS = (LABEL, *DENSE, *SPARSE)
_NAMES = re.compile(r"day_\d+(\.gz)?|train\.txt(\.gz)?|.+\.tsv(\.gz)?|.+\.orc")
_BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 1 << 20
_NUMBER, _HEX = re.compile(rb"-?\d{1,19}"), re.compile(rb"[0-9a-fA-F]{8}")
_GOOD_LINE = re.compile(rb"[01](\t(-?[123]|\d{1,9})?){13}(\t([0-9a-fA-F]{8})?){26}")
Reason = Literal["fields", "label", "count", "category"]


@dataclass(frozen=True)
class Categories:
    """A categorical column of a block. values: distinct, uint32 or int64 [V]. codes_P: index into values of each row
    that has one. present_B: bool.
    """

    values: np.ndarray
    codes_P: np.ndarray
    present_B: np.ndarray


@dataclass(frozen=True)
class Block:
    """Rows in file order. labels_B: int8. counts: DENSE, float64 [B], missing ones as 0. categories: SPARSE."""

    labels_B: np.ndarray
    counts: list[np.ndarray]
    categories: list[Categories]

    @property
    def rows(self) -> int:
        return len(self.labels_B)


class BadRows:
    """What to do with a row that is no example."""

    def __init__(self, policy: Literal["fail", "skip"]) -> None:
        self._policy = policy
        self._told: set[Path] = set()
        self._counts: Counter[str] = Counter()

    def add(self, file: Path, place: str, reason: Reason, problem: str) -> None:
        """Count the row; or DataError if the policy is to fail. The first one of a file is logged."""
        if self._policy == "fail":
            raise DataError(
                f"{file}, {place}: {problem}; correct the row, or pass --on-bad-row skip to count such rows and leave "
                "them out"
            )
        if file not in self._told:
            self._told.add(file)
            log.warning("%s, %s: %s; bad rows of this file are counted and left out", file, place, problem)
        self._counts[reason] += 1

    def take(self) -> dict[str, int]:
        """Rows left out since the last call, by reason."""
        counts, self._counts = dict(sorted(self._counts.items())), Counter()
        return counts


def find_sources(places: Sequence[str]) -> list[Path]:
    """Files of the given files, folders and patterns, in the order of the numbers in their names (day_2 before day_10).

    From a folder: day_N, train.txt and *.tsv, plain or .gz, and *.orc. DataError if there is none, one comes twice, or
    text and ORC are mixed.
    """
    files: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = [each for each in path.iterdir() if each.is_file() and _NAMES.fullmatch(each.name)]
        else:
            found = [path] if path.is_file() else [Path(each) for each in glob(place)]
        if not found:
            raise DataError(
                f"{place}: no such file, or no day_N, train.txt, *.tsv (or .gz of them) or *.orc in it; give --source "
                "Criteo's rows"
            )
        files += found
    files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(file))])
    twice = [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]}: is in --source twice; give each file once")
    if len({is_orc(file) for file in files}) > 1:
        raise DataError(f"{files[0]}, {files[-1]}: --source mixes text and ORC; prepare them one after the other")
    return files


def is_orc(file: Path) -> bool:
    return file.suffix == ".orc"


def read_blocks(file: Path, bad: BadRows) -> Iterator[Block]:
    """The rows of a file, in order, about 4 MiB of text or one ORC stripe at a time.

    Raises DataError for a file that cannot be read, is damaged, or has other columns, and for a bad row as `bad` says.
    """
    try:
        yield from _orc_blocks(file, bad) if is_orc(file) else _text_blocks(file, bad)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read, it is damaged or cut off: {error}") from error


def _text_blocks(file: Path, bad: BadRows) -> Iterator[Block]:
    line = 1
    for text in _whole_lines(file):
        lines = text.count(b"\n")
        block = _parse(text, lines)
        if block is None:
            good = _good_lines(file, line, text, bad)
            block = _parse(b"".join(good), len(good)) if good else None
            if good and block is None:
                raise DataError(f"{file}, lines {line} on: cannot be parsed; check that its lines end in LF or CR LF")
        if block is not None:
            yield block
        line += lines


def _whole_lines(file: Path) -> Iterator[bytes]:
    with pa.input_stream(str(file), compression="gzip" if file.suffix == ".gz" else None) as stream:
        rest = b""
        while read := stream.read(_BLOCK_BYTES):
            cut = read.rfind(b"\n") + 1
            if cut:
                yield rest + read[:cut]
                rest = read[cut:]
            else:
                rest += read
            if len(rest) > _LONGEST_LINE:
                raise DataError(f"{file}: has a line of more than {_LONGEST_LINE} bytes; wanted lines of 40 fields")
        if rest:
            yield rest + b"\n"


def _parse(text: bytes, lines: int) -> Block | None:
    """None if a line may be bad; `_good_lines` decides on blanks and 0x1f too, which Arrow takes for numbers."""
    if b" " in text or b"x" in text or b"X" in text:
        return None
    types: dict[str, pa.DataType] = {LABEL: pa.int8()}
    types |= dict.fromkeys(DENSE, pa.int32()) | dict.fromkeys(SPARSE, pa.binary())
    try:
        table = csv.read_csv(
            pa.BufferReader(text),
            csv.ReadOptions(column_names=_COLUMNS, block_size=len(text) + 1),
            csv.ParseOptions(delimiter="\t", quote_char=False, newlines_in_values=False, ignore_empty_lines=False),
            csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True, check_utf8=False),
        ).combine_chunks()
    except pa.ArrowInvalid:
        return None
    columns = {name: table.column(name).chunk(0) for name in _COLUMNS}
    labels = columns[LABEL]
    if table.num_rows != lines or labels.null_count or not np.isin(labels.to_numpy(), (0, 1)).all():
        return None
    counts = [columns[name].fill_null(0).to_numpy() for name in DENSE]
    if min(column.min() for column in counts) < LEAST_COUNT:
        return None
    categories = [_from_hex(columns[name]) for name in SPARSE]
    if any(column is None for column in categories):
        return None
    return Block(
        labels.to_numpy(), [column.astype(np.float64) for column in counts], [c for c in categories if c is not None]
    )


def _from_hex(column: pa.Array) -> Categories | None:
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1)
    lengths_B = np.diff(offsets)
    present_B = lengths_B > 0
    if (lengths_B[present_B] != 8).any():
        return None
    digits = column.buffers()[2]
    try:
        words = binascii.unhexlify(memoryview(digits)[offsets[0] : offsets[-1]]) if digits is not None else b""
    except binascii.Error:
        return None
    return _categories(np.frombuffer(words, ">u4").astype(np.uint32), present_B)


def _categories(values_P: np.ndarray, present_B: np.ndarray) -> Categories:
    encoded = pa.array(values_P).dictionary_encode()
    return Categories(encoded.dictionary.to_numpy(), encoded.indices.to_numpy(), present_B)


def _good_lines(file: Path, first: int, text: bytes, bad: BadRows) -> list[bytes]:
    """The lines that are good, slowly."""
    kept = []
    for number, line in zip(count(first), text.split(b"\n")[:-1], strict=False):
        bare = line.removesuffix(b"\r")
        fault = None if _GOOD_LINE.fullmatch(bare) else _line_fault(bare)
        if fault is None:
            kept.append(bare + b"\n")
        else:
            bad.add(file, f"line {number}", *fault)
    return kept


def _line_fault(line: bytes) -> tuple[Reason, str] | None:
    fields = line.split(b"\t")
    if len(fields) != len(_COLUMNS):
        return "fields", f"has {len(fields)} fields, wanted {len(_COLUMNS)} (label, 13 counts, 26 categories)"
    for name, field in zip(_COLUMNS, fields, strict=True):
        shown = repr(field.decode("utf-8", "backslashreplace"))
        if name == LABEL and not (_NUMBER.fullmatch(field) and int(field) in (0, 1)):
            return "label", f"label is {shown}, allowed are 0 and 1"
        if name in DENSE and field and not (_NUMBER.fullmatch(field) and _is_count(int(field))):
            return (
                "count",
                f"{name} is {shown}, wanted a whole number from {LEAST_COUNT} to {LARGEST_COUNT}, or nothing",
            )
        if name in SPARSE and field and not _HEX.fullmatch(field):
            return "category", f"{name} is {shown}, wanted 8 hexadecimal digits, or nothing"
    return None


def _is_count(value: float) -> bool:
    return LEAST_COUNT <= value <= LARGEST_COUNT and value == int(value)


def _orc_blocks(file: Path, bad: BadRows) -> Iterator[Block]:
    reader = orc.ORCFile(str(file))
    _check_columns(file, reader.schema)
    row = 0
    for stripe in range(reader.nstripes):
        batch = reader.read_stripe(stripe)
        good_B = _good_rows(file, row, batch, bad)
        row += batch.num_rows
        batch = batch if good_B.all() else batch.filter(pa.array(good_B))
        if batch.num_rows:
            flat = {name: _flat(batch.column(name)) for name in _COLUMNS}
            yield Block(
                flat[LABEL][0].astype(np.int8),
                [_filled(*flat[name]) for name in DENSE],
                [_categories(*flat[name]) for name in SPARSE],
            )


def _check_columns(file: Path, schema: pa.Schema) -> None:
    for name in _COLUMNS:
        wanted = pa.int64() if name in SPARSE else pa.float64()
        if name not in schema.names:
            raise DataError(f"{file}: has no column {name}; wanted {LABEL}, i1 to i13 and c1 to c26")
        kind = schema.field(name).type
        if not pa.types.is_list(kind) or kind.value_type != wanted:
            raise DataError(f"{file}: column {name} has type {kind}, wanted list<{wanted}>")
    unknown = [name for name in schema.names if name not in _COLUMNS]
    if unknown:
        raise DataError(f"{file}: unknown column {unknown[0]}; wanted {LABEL}, i1 to i13 and c1 to c26, and no other")


def _flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values [P] of the rows that have one, and which do, bool [B]. For rows of at most one value."""
    values = column.flatten()
    return values.to_numpy(zero_copy_only=False), column.value_lengths().fill_null(0).to_numpy() > 0


def _filled(values_P: np.ndarray, present_B: np.ndarray) -> np.ndarray:
    column = np.zeros(len(present_B))
    column[present_B] = values_P
    return column


def _good_rows(file: Path, first: int, batch: pa.RecordBatch, bad: BadRows) -> np.ndarray:
    """bool [B]. Reports the others in order of rows, each by its first fault in order of columns."""
    faults: dict[int, tuple[Reason, str]] = {}
    for name in _COLUMNS:
        column = batch.column(name)
        lengths_B = column.value_lengths().fill_null(0).to_numpy()
        least = 1 if name == LABEL else 0
        for row in np.flatnonzero((lengths_B > 1) | (lengths_B < least)).tolist():
            faults.setdefault(
                row, ("fields", f"{name} holds {lengths_B[row]} values, wanted {'' if least else '0 or '}1")
            )
        values = column.flatten()
        rows = np.repeat(np.arange(len(column)), lengths_B)
        for place in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False)).tolist():
            faults.setdefault(int(rows[place]), ("fields", f"{name} holds a null; a missing value is an empty list"))
        if name not in SPARSE:
            numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
            label = name == LABEL
            wrong = ~np.isin(numbers, (0, 1)) if label else ~_are_counts(numbers)
            allowed = "allowed are 0 and 1" if label else f"wanted a whole number from {LEAST_COUNT} to {LARGEST_COUNT}"
            for place in np.flatnonzero(wrong).tolist():
                fault = ("label" if label else "count", f"{name} is {numbers[place]}, {allowed}")
                faults.setdefault(int(rows[place]), fault)  # type: ignore[arg-type]
    good_B = np.ones(batch.num_rows, dtype=bool)
    for row in sorted(faults):
        good_B[row] = False
        bad.add(file, f"row {first + row}", *faults[row])
    return good_B


def _are_counts(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (numbers >= LEAST_COUNT) & (numbers <= LARGEST_COUNT) & (numbers == np.floor(numbers))

"""Criteo's rows, as published, -> blocks of arrays; a bad row is an error with its line, or counted.

Text: lines of a label, 13 counts and 26 categories of 8 hexadecimal digits, separated by tabs, empty where missing
(Kaggle's train.txt and Terabyte's day_0 to day_23, plain or compressed). ORC: the columns label, i1..i13 (double) and
c1..c26 (int64), each a list of at most one value.

A count may be negative down to -3: Kaggle's I2 holds -1 to -3, Terabyte's I8 -1.

B rows of a block, P of them with a value in a column, V distinct values.
"""

import binascii
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.orc as orc

from gr.errors import DataError
from gr.prepare.delimited import Whole
from gr.prepare.lines import BadRows, Fault, parse_lines, shown, whole_lines
from gr.prepare.source import SourceFile, natural_order, reading

LABEL = "label"
DENSE = tuple(f"i{n}" for n in range(1, 14))
SPARSE = tuple(f"c{n}" for n in range(1, 27))
SMALLEST_COUNT, LARGEST_COUNT = -3, 2**31 - 1
_COUNT_RANGE = f"wanted a whole number from {SMALLEST_COUNT} to {LARGEST_COUNT}"
_COLUMNS = (LABEL, *DENSE, *SPARSE)
_NAMES = re.compile(r"(day_\d+|train\.txt|.+\.tsv)(\.gz|\.bz2|\.zst)?|.+\.orc")
_HEX = re.compile(rb"[0-9a-fA-F]{8}")
_GOOD_LINE = re.compile(rb"[01](\t(-?[123]|\d{1,9})?){13}(\t([0-9a-fA-F]{8})?){26}")


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
    def num_rows(self) -> int:
        return len(self.labels_B)


def find_sources(places: Sequence[str]) -> list[Path]:
    """Files of the given files, folders and patterns, in the order of the numbers in their names (day_2 before day_10).

    From a folder: day_N, train.txt and *.tsv, plain or .gz, .bz2 or .zst, and *.orc. DataError if it has none, one
    comes twice, also compressed, or text and ORC are mixed.
    """
    files: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            matches = [file for file in path.iterdir() if file.is_file() and _NAMES.fullmatch(file.name)]
        else:
            matches = [path] if path.is_file() else [Path(name) for name in glob(place)]
        if not matches:
            raise DataError(
                f"{place}: no such file, or no day_N, train.txt, *.tsv (or .gz, .bz2, .zst) or *.orc in it; give "
                "--source Criteo's rows"
            )
        files += matches
    files.sort(key=natural_order)
    unpacked = Counter(re.sub(r"\.(gz|bz2|zst)$", "", str(file.resolve())) for file in files)
    if twice := [file for file, count in unpacked.items() if count > 1]:
        raise DataError(f"{twice[0]}: is in --source twice, perhaps once compressed; give each file once")
    if len({is_orc(file) for file in files}) > 1:
        raise DataError(f"{files[0]}, {files[-1]}: --source mixes text and ORC; prepare them one after the other")
    return files


def is_orc(file: Path) -> bool:
    return file.suffix == ".orc"


def read_blocks(file: Path, bad: BadRows) -> Iterator[Block]:
    """The rows of a file, in order, about 4 MiB of text or one ORC stripe at a time.

    Raises DataError for a file that cannot be read, is damaged, or has other columns, and for a bad row as `bad` says.
    """
    if is_orc(file):
        with reading(file):
            yield from _orc_blocks(file, bad)
    else:
        text = SourceFile(file)
        with text.open() as stream:
            yield from parse_lines(text, whole_lines(text, stream), _parse, _fault, bad)


def _parse(text: bytes) -> Block:
    """ValueError if a line may be bad; `_fault` decides on blanks and 0x1f too, which Arrow takes for numbers."""
    if b" " in text or b"x" in text or b"X" in text:
        raise ValueError("a blank or an x")
    types: dict[str, pa.DataType] = {LABEL: pa.int8()}
    types |= dict.fromkeys(DENSE, pa.int32()) | dict.fromkeys(SPARSE, pa.binary())
    table = csv.read_csv(
        pa.BufferReader(text),
        csv.ReadOptions(column_names=_COLUMNS, block_size=len(text) + 1),
        csv.ParseOptions(delimiter="\t", quote_char=False, newlines_in_values=False, ignore_empty_lines=False),
        csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True, check_utf8=False),
    ).combine_chunks()
    columns = {name: table.column(name).chunk(0) for name in _COLUMNS}
    labels = columns[LABEL]
    if table.num_rows != text.count(b"\n") or labels.null_count or not np.isin(labels.to_numpy(), (0, 1)).all():
        raise ValueError("a line is cut in two, or a label is not 0 or 1")
    counts = [columns[name].fill_null(0).to_numpy() for name in DENSE]
    if min(column.min() for column in counts) < SMALLEST_COUNT:
        raise ValueError(f"a count is below {SMALLEST_COUNT}")
    categories = [_from_hex(columns[name]) for name in SPARSE]
    return Block(labels.to_numpy(), [column.astype(np.float64) for column in counts], categories)


def _from_hex(column: pa.Array) -> Categories:
    """ValueError (binascii's too) if a value is not 8 hexadecimal digits."""
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1)
    lengths_B = np.diff(offsets)
    present_B = lengths_B > 0
    if (lengths_B[present_B] != 8).any():
        raise ValueError("a category has not 8 digits")
    digits = column.buffers()[2]
    words = binascii.unhexlify(memoryview(digits)[offsets[0] : offsets[-1]]) if digits is not None else b""
    return _categories(np.frombuffer(words, ">u4").astype(np.uint32), present_B)


def _categories(values_P: np.ndarray, present_B: np.ndarray) -> Categories:
    encoded = pa.array(values_P).dictionary_encode()
    return Categories(encoded.dictionary.to_numpy(), encoded.indices.to_numpy(), present_B)


def _fault(line: bytes) -> Fault | None:
    if _GOOD_LINE.fullmatch(line):
        return None
    fields = line.split(b"\t")
    if len(fields) != len(_COLUMNS):
        commas = "; its separator is a comma, wanted a tab" if line.count(b",") >= len(SPARSE) else ""
        wanted = f"wanted {len(_COLUMNS)} (label, 13 counts, 26 categories)"
        return Fault("fields", f"has {len(fields)} fields, {wanted}{commas}")
    for name, field in zip(_COLUMNS, fields, strict=True):
        if name == LABEL and Whole(0, 1).problem(field):
            return Fault("label", f"label is {shown(field)}, allowed are 0 and 1")
        if name in DENSE and field and Whole(SMALLEST_COUNT, LARGEST_COUNT).problem(field):
            return Fault("count", f"{name} is {shown(field)}, {_COUNT_RANGE}, or nothing")
        if name in SPARSE and field and not _HEX.fullmatch(field):
            return Fault("category", f"{name} is {shown(field)}, wanted 8 hexadecimal digits, or nothing")
    return None


def _orc_blocks(file: Path, bad: BadRows) -> Iterator[Block]:
    reader = orc.ORCFile(str(file))
    _check_columns(file, reader.schema)
    first = 0
    for stripe in range(reader.nstripes):
        batch = reader.read_stripe(stripe)
        try:
            block = _from_lists(batch)
        except ValueError:
            faults = list(map(_fault_of_lists, batch.to_pylist()))
            for row, fault in enumerate(faults, first):
                if fault:
                    bad.add(file, f"row {row}", fault)
            block = _from_lists(batch.filter(pa.array([fault is None for fault in faults], pa.bool_())))
        if block.num_rows:
            yield block
        first += batch.num_rows


def _check_columns(file: Path, schema: pa.Schema) -> None:
    layout = f"wanted {LABEL}, i1 to i13 and c1 to c26"
    for name in _COLUMNS:
        if name not in schema.names:
            raise DataError(f"{file}: has no column {name}; {layout}")
        kind, element = schema.field(name).type, pa.int64() if name in SPARSE else pa.float64()
        if not pa.types.is_list(kind) or kind.value_type != element:
            raise DataError(f"{file}: column {name} has type {kind}, wanted list<{element}>")
    if unknown := [name for name in schema.names if name not in _COLUMNS]:
        raise DataError(f"{file}: unknown column {unknown[0]}; {layout}, and no other")


def _from_lists(batch: pa.RecordBatch) -> Block:
    """ValueError if `_fault_of_lists` has one for a row."""
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in _COLUMNS:
        values, lengths_B = batch.column(name).flatten(), batch.column(name).value_lengths().fill_null(0).to_numpy()
        if values.null_count or (lengths_B > 1).any():
            raise ValueError(f"{name} has a null, or several values in a row")
        columns[name] = values.to_numpy(), lengths_B > 0
    labels, present_B = columns[LABEL]
    if not present_B.all() or not np.isin(labels, (0, 1)).all():
        raise ValueError("a label is not 0 or 1")
    counts = []
    for name in DENSE:
        values_P, present_B = columns[name]
        if not ((values_P >= SMALLEST_COUNT) & (values_P <= LARGEST_COUNT) & (values_P == np.floor(values_P))).all():
            raise ValueError(f"{name} is no count")
        counts.append(np.zeros(len(present_B)))
        counts[-1][present_B] = values_P
    return Block(labels.astype(np.int8), counts, [_categories(*columns[name]) for name in SPARSE])


def _fault_of_lists(row: dict[str, list[float | None] | None]) -> Fault | None:
    for name in _COLUMNS:
        values = row[name] or []
        if len(values) > 1 or (name == LABEL and not values):
            allowed = "1" if name == LABEL else "0 or 1"
            return Fault("fields", f"{name} holds {len(values)} values, wanted {allowed}")
        for value in values:
            if value is None:
                return Fault("fields", f"{name} holds a null; a missing value is an empty list")
            if name == LABEL and value not in (0, 1):
                return Fault("label", f"label is {value}, allowed are 0 and 1")
            if name in DENSE and not (SMALLEST_COUNT <= value <= LARGEST_COUNT and value == int(value)):
                return Fault("count", f"{name} is {value}, {_COUNT_RANGE}")
    return None

"""Text files of events -> arrays, block by block; a malformed line is a DataError with file and line number."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
from tqdm import tqdm

from gr.errors import DataError
from gr.prepare.source import SourceFile

_BLOCK_BYTES = 16 << 20
_SEPARATOR = "\x01"


@dataclass(frozen=True)
class Format:
    """Lines of user, item, rating, time. header: lines to skip. ids: Arrow type of user and item."""

    separator: str
    header: int
    ids: pa.DataType

    @property
    def line(self) -> re.Pattern[bytes]:
        """What a good line looks like; used only to find the line that is not."""
        number = rb"-?\d+(\.\d+)?"
        name = rb"[1-9]\d*" if pa.types.is_integer(self.ids) else rb"[^%s\r\n]+" % re.escape(self.separator).encode()
        fields = re.escape(self.separator).encode().join([b"(%s)" % name, b"(%s)" % name, number, number])
        return re.compile(rb"%s\r?\n?" % fields)


def parse_events(file: SourceFile, form: Format) -> Iterator[pa.RecordBatch]:
    """Blocks of the columns user, item (form.ids), rating float32, time int64 (whole seconds), in file order.

    Raises DataError naming file and line for a line that has not four fields, has a field of another kind, or an
    integer id below 1.
    """
    with file.open() as stream, _progress(file) as bar:
        source = _Blocks(stream, form.separator.encode(), bar.update)
        try:
            for batch in _read(source, form):
                yield _checked(batch, file, form)
        except pa.ArrowInvalid as error:
            raise _malformed(file, form, str(error)) from None


def parse_catalogue(
    file: SourceFile, id_of_line: Callable[[str], int], *, encoding: str, header: int = 0
) -> np.ndarray:
    """Item ids, int64 ascending, one a line. id_of_line raises ValueError on a malformed line."""
    ids = []
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            if number <= header:
                continue
            try:
                item = id_of_line(line.decode(encoding).rstrip("\r\n"))
                if item < 1:
                    raise ValueError(f"item id {item} is below 1")
            except ValueError as error:
                raise DataError(f"{file}, line {number}: {error}") from None
            ids.append(item)
    if not ids:
        raise DataError(f"{file}: has no items")
    return np.unique(np.array(ids, dtype=np.int64))


def check_in_catalogue(file: SourceFile, form: Format, items: np.ndarray, catalogue: np.ndarray) -> None:
    """Raises DataError naming the line of the first event whose item the catalogue lacks. items: in file order."""
    known = np.zeros(max(int(items.max(initial=0)), int(catalogue.max())) + 1, dtype=bool)
    known[catalogue] = True
    unknown = ~known[items]
    if unknown.any():
        first = int(unknown.argmax())
        raise DataError(f"{file}, line {first + 1 + form.header}: item {items[first]} is not in the list of items")


def _read(source: "_Blocks", form: Format) -> Iterator[pa.RecordBatch]:
    reader = csv.open_csv(
        pa.PythonFile(source, mode="r"),
        csv.ReadOptions(
            use_threads=False,
            block_size=_BLOCK_BYTES,
            skip_rows=form.header,
            column_names=["user", "item", "rating", "time"],
            encoding="utf8",
        ),
        csv.ParseOptions(
            delimiter=_SEPARATOR,
            quote_char=False,
            double_quote=False,
            newlines_in_values=False,
            ignore_empty_lines=False,
        ),
        csv.ConvertOptions(
            column_types={"user": form.ids, "item": form.ids, "rating": pa.float32(), "time": pa.float64()},
            null_values=[],
            strings_can_be_null=False,
        ),
    )
    yield from reader


def _checked(batch: pa.RecordBatch, file: SourceFile, form: Format) -> pa.RecordBatch:
    time = batch.column("time").to_numpy()
    whole = np.isfinite(time) & (time == np.floor(time)) & np.isfinite(batch.column("rating").to_numpy())
    good = bool(whole.all())
    for name in ("user", "item"):
        column = batch.column(name)
        good = good and column.null_count == 0
        if good and pa.types.is_integer(form.ids):
            good = bool((column.to_numpy() >= 1).all())
    if not good:
        raise _malformed(file, form, "a value is missing, not finite, or an id is below 1")
    seconds = pa.array(time.astype(np.int64))
    return pa.RecordBatch.from_arrays([*batch.columns[:3], seconds], names=["user", "item", "rating", "time"])


def _malformed(file: SourceFile, form: Format, problem: str) -> DataError:
    """Read again, slowly, to name the line."""
    pattern, number = form.line, 0
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            if number > form.header and not pattern.fullmatch(line):
                shown = line.decode("utf-8", "replace").rstrip("\r\n")
                return DataError(
                    f"{file}, line {number}: {shown!r} is not user{form.separator}item{form.separator}rating"
                    f"{form.separator}time"
                )
    if number <= form.header:
        return DataError(f"{file}: has no events")
    return DataError(f"{file}: cannot be parsed: {problem}")


def _progress(file: SourceFile) -> tqdm:
    return tqdm(total=file.size, unit="B", unit_scale=True, desc=file.name, disable=None)


class _Blocks:
    """A read-only stream for Arrow: its separator replaced by one byte that no file contains, and progress told."""

    closed = False

    def __init__(self, stream: BinaryIO, separator: bytes, progress: Callable[[int], object]) -> None:
        self._stream, self._separator, self._progress = stream, separator, progress
        self._ready = b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._ready) < size:
            block = self._stream.read(_BLOCK_BYTES)
            if not block:
                break
            block += self._stream.readline()  # whole lines, so that no separator is cut in two
            self._progress(len(block))
            self._ready += block.replace(self._separator, _SEPARATOR.encode())
        size = len(self._ready) if size < 0 else size
        out, self._ready = self._ready[:size], self._ready[size:]
        return out

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

"""Lines of text -> blocks of arrays: parsed by Arrow, and examined one by one only where Arrow meets a bad line."""

from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeVar

from tqdm import tqdm

from gr.errors import DataError
from gr.logging import get_logger
from gr.prepare.source import SourceFile

log = get_logger(__name__)

OnBadRow = Literal["fail", "skip"]
BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 1 << 20
_SHOWN = 80
_NO_TEXT = (b"PAR", b"ORC", b"PK\x03")
Block = TypeVar("Block")


class Fault(NamedTuple):
    """The fault of a row that is no example. reason: the name it is counted under. column: the field at fault."""

    reason: str
    problem: str
    column: str | None = None


class BadRows:
    """Policy for bad rows: a DataError, or they are left out and counted by reason."""

    def __init__(self, policy: OnBadRow | None = None) -> None:
        """policy: None fails like "fail", for commands that have no --on-bad-row."""
        self._policy = policy
        self._logged: set[object] = set()
        self._counts: Counter[str] = Counter()

    def add(self, file: Path | SourceFile, place: str, fault: Fault) -> None:
        """Count the row, and log the first one of a file; DataError unless the policy is to skip."""
        where = f"{file}, {place}" + (f", column {fault.column}" if fault.column else "")
        if self._policy is None:
            raise DataError(f"{where}: {fault.problem}")
        if self._policy == "fail":
            raise DataError(
                f"{where}: {fault.problem}; correct the row, or pass --on-bad-row skip to count such rows and leave "
                "them out"
            )
        if file not in self._logged:
            self._logged.add(file)
            log.warning("%s: %s; bad rows of this file are counted and left out", where, fault.problem)
        self._counts[fault.reason] += 1

    def take(self) -> dict[str, int]:
        """Rows left out since the last call, by reason."""
        counts, self._counts = dict(sorted(self._counts.items())), Counter()
        return counts

    def note(self) -> list[str]:
        """The sentence for schema.json on the rows left out since the last `take`, which is also logged; or nothing."""
        total, counts = self._counts.total(), self.take()
        if not counts:
            return []
        text = f"{total} bad events left out: {', '.join(f'{reason} {count}' for reason, count in counts.items())}"
        log.warning(text)
        return [text]


def parse_lines(
    file: SourceFile,
    texts: Iterable[bytes],
    parse: Callable[[bytes], Block],
    fault_of_line: Callable[[bytes], Fault | None],
    bad: BadRows,
    *,
    first: int = 1,
    is_suspect: Callable[[bytes], bool] = lambda text: False,
) -> Iterator[Block]:
    """Blocks of `texts`, which hold whole lines, in file order; bad lines as `bad` says. first: number of line one.

    parse: makes a block of good lines, and raises ValueError (as Arrow does) where a line may be bad; only then, or
    where the text is suspect, fault_of_line examines the lines, given without their ends. DataError where it finds none
    and parse still fails.
    """
    line = first
    for text in texts:
        block = None
        try:
            if text.startswith(BOM_UTF8) or is_suspect(text):  # Arrow skips this mark
                raise ValueError("a line may be bad that Arrow takes")
            block = parse(text)
        except ValueError:
            good = []
            for number, one in enumerate(text.split(b"\n")[:-1], line):
                bare = one.removesuffix(b"\r")
                if fault := fault_of_line(bare):
                    bad.add(file, f"line {number}", fault)
                else:
                    good.append(bare + b"\n")
            try:
                block = parse(b"".join(good)) if good else None
            except ValueError as error:
                raise DataError(f"{file}, lines {line} to {number}: cannot be parsed: {error}") from None
        if block is not None:
            yield block
        line += text.count(b"\n")


def shown(field: bytes) -> str:
    """A field as a message quotes it, cut off where it is long."""
    text = field[:_SHOWN].decode("utf-8", "backslashreplace")
    return repr(text) + (f" and {len(field) - _SHOWN} bytes more" if len(field) > _SHOWN else "")


def text_blocks(file: SourceFile, *, header: bool = False) -> Iterator[bytes]:
    """Whole lines of a file, without the first where it is a header, with progress in bytes."""
    with file.open() as stream, tqdm(total=file.size, unit="B", unit_scale=True, desc=file.name, disable=None) as bar:
        for number, text in enumerate(whole_lines(file, stream)):
            lines = text[text.index(b"\n") + 1 :] if header and not number else text
            if lines:
                yield lines
            bar.update(len(text))


def whole_lines(file: SourceFile, stream: BinaryIO) -> Iterator[bytes]:
    """Blocks of about BLOCK_BYTES that end with a line; a last line without an end gets one. A byte order mark and
    blank lines at the end of the file are left out. DataError for a line of more than about 1 MiB.
    """
    rest = stream.read(len(BOM_UTF8)).removeprefix(BOM_UTF8)
    if rest.startswith(_NO_TEXT):
        raise DataError(f"{file}: is a Parquet, ORC or zip file; wanted lines of text")
    while block := stream.read(BLOCK_BYTES):
        text = rest + block
        end = len(text[: text.rfind(b"\n") + 1].rstrip(b"\r\n"))
        cut = text.index(b"\n", end) + 1 if end else 0
        if cut:
            yield text[:cut]
        elif b"\r" in text.rstrip(b"\r\n") and b"\n" not in text:
            raise DataError(f"{file}: its lines end in CR alone; write them with LF or CR LF")
        rest = text[cut:]
        if len(rest) > _LONGEST_LINE:
            raise DataError(f"{file}: has a line, or blank lines, of more than {_LONGEST_LINE} bytes")
    if rest.strip(b"\r\n"):
        yield rest + b"\n"

"""Lines of text -> blocks of arrays: parsed by Arrow, and examined one by one only where Arrow meets a bad line."""

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
    file: Path | SourceFile,
    texts: Iterable[bytes],
    parse: Callable[[bytes], Block],
    fault_of_line: Callable[[bytes], Fault | None],
    bad: BadRows,
    *,
    first: int = 1,
) -> Iterator[Block]:
    """Blocks of `texts`, which hold whole lines, in file order; bad lines as `bad` says. first: number of line one.

    parse: makes a block of good lines, and raises ValueError (as Arrow does) where a line may be bad; only then
    fault_of_line examines the lines, given without their ends. DataError where it finds none and parse still fails.
    """
    line = first
    for text in texts:
        block = None
        try:
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
                problem = f"cannot be parsed: {error}; check that its lines end in LF or CR LF"
                raise DataError(f"{file}, lines {line} on: {problem}") from None
        if block is not None:
            yield block
        line += text.count(b"\n")


def text_blocks(file: SourceFile, *, header: int) -> Iterator[bytes]:
    """Whole lines of a file after `header` lines, with progress in bytes."""
    with (
        file.open() as stream,
        tqdm(total=file.size, unit="B", unit_scale=True, desc=file.name, disable=None) as bar,
    ):
        for _ in range(header):
            bar.update(len(stream.readline()))
        for text in whole_lines(file, stream):
            yield text
            bar.update(len(text))


def whole_lines(file: Path | SourceFile, stream: BinaryIO) -> Iterator[bytes]:
    """Blocks of about BLOCK_BYTES that end with a line; a last line without an end gets one. DataError for a line of
    more than 1 MiB.
    """
    rest = b""
    while block := stream.read(BLOCK_BYTES):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
        if len(rest) > _LONGEST_LINE:
            raise DataError(f"{file}: has a line of more than {_LONGEST_LINE} bytes")
    if rest:
        yield rest + b"\n"

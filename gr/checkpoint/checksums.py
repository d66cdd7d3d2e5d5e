"""Checksums of a checkpoint's files, which torch.distributed.checkpoint does not keep.

One list of them all, written when the checkpoint is complete, in the form of `sha256sum`: `sha256sum -c SHA256SUMS`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from gr.files import sha256_of, write_text

SUMS = "SHA256SUMS"


def sum_lines(digests: Mapping[str, str]) -> str:
    """The lines of files, in the order of their names. digests: name -> SHA-256."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def write_sums(folder: Path, lines: Iterable[str]) -> None:
    """lines: those of every rank."""
    write_text(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name. A damaged list may hold anything, also bytes that are no text and names that are no names."""
    if not (folder / SUMS).exists():
        return {}
    lines = (folder / SUMS).read_bytes().decode(errors="replace").splitlines()
    entries = [line.partition("  ") for line in lines]
    return {_inside(name): digest for digest, _, name in entries if _inside(name) != "."}


def find_damage(folder: Path, shared: Iterable[str], rank: int, size: int) -> str:
    """The first damaged file of this rank's share, with what is wrong; empty where all are as they were written.

    The ranks of a world of `size` go over the files of all the ranks that wrote them. Raises OSError where a file is
    there and cannot be read: that is no damage.
    """
    sums = read_sums(folder)
    names = sorted({*sums, *shared, *(path.name for path in folder.glob("*.distcp"))})
    for name in names[rank::size]:
        if name not in sums:
            return f"{folder / name}: has no checksum"
        try:
            if sha256_of(folder / name) != sums[name]:
                return f"{folder / name}: is not what was written (checksum)"
        except (FileNotFoundError, IsADirectoryError) as error:
            return f"{folder / name}: cannot be read: {error.strerror}"
    return ""


def _inside(name: str) -> str:
    """A name of the list, or its last part where it leads out of the checkpoint."""
    path = PurePosixPath(name.replace("\0", "?"))
    return path.name if path.is_absolute() or ".." in path.parts else str(path)

"""Checksums of a checkpoint's files, which torch.distributed.checkpoint does not keep.

Each rank writes rank-R.sha256 for the files it wrote, as `sha256sum` does: `sha256sum -c *.sha256` checks them too.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from gr.files import write_text

SUMS = "rank-*.sha256"


def write_sums(folder: Path, rank: int, shared: Iterable[str]) -> None:
    """Of this rank's data files, and of the `shared` files on rank 0, which wrote them."""
    names = sorted(path.name for path in folder.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        names += shared
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
    write_text(folder / f"rank-{rank}.sha256", "".join(lines))


def find_damage(folder: Path, shared: Iterable[str], rank: int, size: int) -> str:
    """The first damaged file of this rank's share, with what is wrong; empty where all are as they were written.

    The ranks of a world of `size` go over the files of all the ranks that wrote them.
    """
    sums: dict[str, str] = {}
    for path in sorted(folder.glob(SUMS)):
        # A damaged list of sums may hold anything, also bytes that are no text and names that are no names.
        for line in path.read_bytes().decode(errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            sums[Path(name.replace("\0", "?")).name] = digest
    names = sorted({*sums, *shared, *(path.name for path in folder.glob("*.distcp"))})
    for name in names[rank::size]:
        if name not in sums:
            return f"{folder / name}: has no checksum"
        try:
            if _digest(folder / name) != sums[name]:
                return f"{folder / name}: is not what was written (checksum)"
        except OSError as error:
            return f"{folder / name}: cannot be read: {error.strerror}"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The lock of a folder that one process at a time writes."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gr.errors import TransientError

LOCK = ".lock"


@contextmanager
def only_writer(folder: Path, drafts: str) -> Iterator[None]:
    """Nobody else writes into the folder, and what an earlier writer left half done is gone. drafts: a pattern of it.

    Raises TransientError where another process writes the folder.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransientError(f"{folder}: another gr export or gr publish writes it; wait for its end") from None
        for left in folder.glob(drafts):
            shutil.rmtree(left)
        yield

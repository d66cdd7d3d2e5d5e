"""Atomic, durable replacement of files, their digests, and the rule which file system errors another try may cure."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)  # another owner or mount is needed
OF_ANOTHER_KIND = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)  # another path is needed
_PERMANENT = {
    *DISK_FULL,
    *NO_RIGHT,
    *OF_ANOTHER_KIND,
    errno.ENOENT,
    # Another file system is needed: this one has no locks.
    *(errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL),
}


def is_transient(error: BaseException) -> bool:
    """True for an OSError that another try may cure, such as EIO or ESTALE of a network file system.

    An OSError without a number comes from a library that rejects the content of a file, so it is not transient.
    """
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _PERMANENT


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder and the folders in it, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def make_folder(path: Path, fault: type[Exception]) -> None:
    """A folder for what a command writes, and those above it. Raises `fault`; OSError where another try may help."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_transient(error):
            raise
        raise fault(f"{path}: cannot be made: {error.strerror}; name another folder") from error


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk: they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces the file at `path` atomically: a reader sees the old text or the new, also after a power failure."""
    draft = path.with_name(f".{path.name}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def parse_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text, where a byte-order mark may stand first.

    parse_constant: takes NaN, Infinity and -Infinity. Raises ValueError, with the line where there is one, for any
    other text, and where an object has a key twice: which of the two was meant, nobody knows.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=parse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; keep one")
    return value


def read_json(path: Path, fault: type[Exception], remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises `fault` with the file, the cause and the remedy for any other content, OSError where another try may help.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("holds no JSON object")
    except UnicodeDecodeError as error:
        raise fault(f"{path}: cannot be read: not UTF-8 text (byte {error.start}); {remedy}") from None
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise fault(f"{path}: cannot be read: {reason}; {remedy}") from None
    return value


def write_json(path: Path, value: Any) -> None:
    """Replaces the file at `path` atomically, as write_text does."""
    write_text(path, json.dumps(value, indent=2) + "\n")

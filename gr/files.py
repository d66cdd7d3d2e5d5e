"""Files that a reader never sees half of, and that survive a power failure; which faults of a file system stay."""

import errno
import json
import os
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOR_GOOD = {
    *DISK_FULL,
    *(
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    ),  # another path is needed
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # another owner or mount
    *(errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL),  # another file system: this one has no locks
}


def is_transient(error: BaseException) -> bool:
    """Whether a file system said no in a way that another try may cure, such as EIO or ESTALE of a network.

    An OSError without a number is a library's word on what it read, and stays.
    """
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _FOR_GOOD


def write_text(path: Path, text: str) -> None:
    """Replaces `path` at once."""
    draft = path.with_name(f".{path.name}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` at once."""
    write_text(path, json.dumps(value, indent=2) + "\n")

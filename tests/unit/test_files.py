"""Atomic replacement of files, and the rule which errors are transient."""

import errno
import json
from pathlib import Path

import pytest

from gr.files import is_transient, write_json


def test_a_json_file_is_never_half_written(tmp_path: Path) -> None:
    write_json(tmp_path / "best.json", {"step": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "best.json", {"step": object()})
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1}


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "x"), True),
        (OSError(errno.ESTALE, "x"), True),
        (OSError(errno.ENOTEMPTY, "x"), True),
        (TimeoutError(errno.ETIMEDOUT, "x"), True),
        (OSError(errno.ENOSPC, "x"), False),
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (PermissionError(errno.EACCES, "x"), False),
        (OSError("Parquet magic bytes not found"), False),
        (ValueError("x"), False),
    ],
)
def test_what_another_try_may_cure(error: Exception, passes: bool) -> None:
    assert is_transient(error) is passes

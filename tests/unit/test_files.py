"""Atomic replacement of files, and the rule which errors are transient."""

import errno
import json
from pathlib import Path

import pytest

from gr.errors import DataError
from gr.files import is_transient, make_folder, read_json, write_json


def test_a_json_file_is_never_half_written(tmp_path: Path) -> None:
    write_json(tmp_path / "best.json", {"step": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "best.json", {"step": object()})
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file or directory"),
        (b"", "line 1 is not JSON"),
        (b'{"step": 1,\n', "line 2 is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b"\xff{}", r"not UTF-8 text \(byte 0\)"),
        (b"[" * 99_999, "nested too deep"),
        (b'{"a": {"step": 1, "step": 2}}', "an object has the key 'step' twice; keep one"),
        (b'{"step": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_a_json_file_that_gr_did_not_write_is_one_line(tmp_path: Path, content: bytes | None, cause: str) -> None:
    path = tmp_path / "note.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: cannot be read: {cause}.*; write it again$"):
        read_json(path, DataError, "write it again")


@pytest.mark.parametrize(("path", "cause"), [("/proc/x", "No such file or directory"), ("/dev/null/x", "Not a dir")])
def test_a_folder_that_cannot_be_made(path: str, cause: str) -> None:
    with pytest.raises(DataError, match=f"^{path}: cannot be made: {cause}.*; name another folder$"):
        make_folder(Path(path), DataError)


def test_an_editor_that_writes_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_bytes(b'\xef\xbb\xbf{"step": 1}')
    assert read_json(tmp_path / "note.json", DataError, "") == {"step": 1}


def test_a_disk_that_fails_for_now_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        read_json(tmp_path / "note.json", DataError, "write it again")


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

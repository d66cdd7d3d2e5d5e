"""status.json: writing, keeping a failure, refusing damaged files."""

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from gr.errors import GRError
from gr.status import RunError, RunStatus, StatusFile, read_status

BEGUN = RunStatus("running", step=20, steps=100, world_size=2, checkpoint=20, updated=1.0)
LOST = RunError(rank=1, host="h2", message="part-0 has gone")


@pytest.fixture
def status(tmp_path: Path) -> StatusFile:
    status = StatusFile(tmp_path)
    status.start(BEGUN)
    return status


def test_the_fields_of_the_contract(status: StatusFile) -> None:
    assert json.loads((status.run_dir / "status.json").read_text()) == {
        "state": "running",
        "step": 20,
        "steps": 100,
        "world_size": 2,
        "loss": None,
        "seconds_per_step": None,
        "checkpoint": 20,
        "save_seconds": None,
        "updated": 1.0,
        "error": None,
    }
    assert read_status(status.run_dir) == BEGUN


def test_an_update_keeps_what_it_does_not_name(status: StatusFile) -> None:
    status.update(step=30, loss=2.5)
    now = read_status(status.run_dir)
    assert (now.step, now.loss, now.checkpoint, now.state) == (30, 2.5, 20, "running") and now.updated > 1.0


def test_the_first_failure_stays_until_the_next_start(status: StatusFile) -> None:
    status.fail(LOST)
    status.fail(RunError(rank=0, host="h1", message="connection closed"))
    status.update(step=40)
    now = read_status(status.run_dir)
    assert (now.state, now.error, now.step) == ("failed", LOST, 20)
    status.start(BEGUN)
    assert read_status(status.run_dir) == BEGUN


@pytest.mark.parametrize(
    "field",
    [
        *({"step": "7"}, {"steps": True}, {"loss": [None]}, {"updated": float("nan")}, {"updated": 1e300}),
        *({"step": 1.5}, {"error": {"rank": "1", "host": "h", "message": "m"}}, {"checkpoint": {}}, {"steps": 10**30}),
    ],
)
def test_a_field_of_another_type(status: StatusFile, field: dict) -> None:
    (status.run_dir / "status.json").write_text(json.dumps(asdict(BEGUN) | field))
    with pytest.raises(GRError, match=r"status\.json: not a status of this version"):
        read_status(status.run_dir)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps(asdict(BEGUN) | {"state": "fine"})])
def test_a_file_that_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(GRError, match=r"status\.json: not a status of this version"):
        read_status(tmp_path)


def test_a_status_that_cannot_be_read_just_now_is_no_failure(
    status: StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(_: Path, errors: str | None = None) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        status.update(step=30)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[]", b"5", b"null", b'{"state": "running", "error": 3}', b"[" * 99_999]
)
def test_a_status_that_gr_did_not_write_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(GRError, match="not a status of this version of gr"):
        read_status(tmp_path)


@pytest.mark.parametrize("text", [None, "garbage", "[]"])
def test_a_file_that_another_program_spoils_is_written_anew(status: StatusFile, text: str | None) -> None:
    path = status.run_dir / "status.json"
    path.unlink() if text is None else path.write_text(text)
    StatusFile(status.run_dir).update(step=30)
    assert read_status(status.run_dir).step == 30 and read_status(status.run_dir).checkpoint == 20
    StatusFile(status.run_dir).fail(LOST)
    assert read_status(status.run_dir).error == LOST


def test_a_process_that_wrote_no_status_leaves_a_spoilt_one(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("garbage")
    with pytest.raises(GRError, match="not a status of this version"):
        StatusFile(tmp_path).update(step=30)


def test_a_full_disk_keeps_no_failure_back(status: StatusFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gr.status.write_json", full)
    status.fail(LOST)
    assert read_status(status.run_dir).error == LOST and read_status(status.run_dir).state == "failed"
    status.start(BEGUN)  # shorter: nothing of the longer one is left
    assert read_status(status.run_dir) == BEGUN
    (status.run_dir / "status.json").unlink()
    with pytest.raises(OSError, match="No space left"):
        status.start(BEGUN)

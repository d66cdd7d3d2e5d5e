"""Checkpoints on disk: what is looked at, what is kept, what is removed."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from gr.checkpoint import CheckpointFolder, resolve
from gr.checkpoint.checksums import SUMS, find_damage
from gr.checkpoint.layout import BEST, FORMAT, PROGRESS, read_progress
from gr.errors import CheckpointError


def write(folder: Path, step: int, content: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps({"step": step}))
    (folder / "data").write_text(content)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def folder(run_dir: Path) -> CheckpointFolder:
    """Steps 20, 100 and 9, and a partial 120."""
    folder = CheckpointFolder(run_dir / "checkpoints")
    for step in (20, 100, 9):
        write(folder.final(step), step)
    write(folder.partial(120), 120)
    return folder


def test_steps_are_the_complete_ones_ascending(folder: CheckpointFolder) -> None:
    (folder.path / "step-00000300").mkdir()  # without progress.json
    (folder.path / "step-00000400").write_text("a file")
    write(folder.path / "step-500", 500)
    write(folder.path / "step-00000600.bak", 600)
    assert folder.steps() == [9, 20, 100]
    assert folder.latest() == folder.final(100)


def test_order_is_by_number_past_eight_digits(folder: CheckpointFolder) -> None:
    write(folder.final(123_456_789), 123_456_789)
    assert folder.latest() == folder.path / "step-123456789"


def test_nothing_there(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "none")
    assert folder.steps() == [] and folder.latest() is None and folder.best() is None
    folder.remove_partial()
    folder.prune(1)


class TestResolve:
    def test_the_latest_of_a_run(self, run_dir: Path, folder: CheckpointFolder) -> None:
        assert resolve(run_dir) == resolve(folder.path) == resolve(str(run_dir)) == folder.final(100)

    def test_the_best_before_the_latest(self, run_dir: Path, folder: CheckpointFolder) -> None:
        folder.mark_best(20, "ndcg@10", 0.5)
        assert resolve(run_dir) == resolve(folder.path) == folder.final(20)

    def test_a_best_that_is_gone(self, run_dir: Path, folder: CheckpointFolder) -> None:
        folder.mark_best(21, "ndcg@10", 0.5)
        assert resolve(run_dir) == folder.final(100)

    def test_one_checkpoint_itself(self, folder: CheckpointFolder) -> None:
        folder.mark_best(20, "ndcg@10", 0.5)
        assert resolve(folder.final(9)) == folder.final(9)

    @pytest.mark.parametrize("path", ["missing", ".", "run/checkpoints/step-00000011"])
    def test_none(self, tmp_path: Path, folder: CheckpointFolder, path: str) -> None:
        with pytest.raises(CheckpointError, match="no checkpoint there; expected a run folder or a step-XXXXXXXX"):
            resolve(tmp_path / path)

    def test_only_a_partial_one(self, tmp_path: Path) -> None:
        write(tmp_path / "checkpoints" / ".step-00000005", 5)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            resolve(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [(1, None, [100]), (2, None, [20, 100]), (9, None, [9, 20, 100]), (1, 9, [9, 100]), (2, 100, [20, 100])],
)
def test_prune_keeps_the_newest_and_the_best(
    folder: CheckpointFolder, keep_last: int, best: int | None, kept: list[int]
) -> None:
    if best is not None:
        folder.mark_best(best, "mrr", 0.1)
    folder.prune(keep_last)
    assert folder.steps() == kept
    assert folder.partial(120).is_dir(), "one that is being written is not pruned"


def test_a_partial_one_that_someone_reads_does_not_keep_a_run_from_starting(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps the file as .nfsXXXX until its reader is done. A part of a checkpoint must not stay."""

    def keep(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", keep)
    folder.remove_partial()
    (folder.partial(120) / "__0_0.distcp").write_text("")
    with pytest.raises(OSError, match="not empty"):
        folder.remove_partial()


def test_a_folder_under_the_name_of_another_step(folder: CheckpointFolder) -> None:
    (folder.final(9) / PROGRESS).write_text(json.dumps({"format": FORMAT, "step": 6, "data": {}}))
    with pytest.raises(CheckpointError, match=r"step-00000009: is of step 6 .*; name the folder step-00000006$"):
        read_progress(folder.final(9))


def test_a_list_of_checksums_that_is_none(folder: CheckpointFolder) -> None:
    (folder.final(9) / SUMS).write_text("garbage\n\n")
    assert find_damage(folder.final(9), [PROGRESS], 0, 1) == f"{folder.final(9) / PROGRESS}: has no checksum"


@pytest.mark.parametrize("step", [-1, 2**63, 1.5, True, None, "9"])
def test_progress_that_is_none(folder: CheckpointFolder, step: object) -> None:
    good = {"format": FORMAT, "step": 9, "data": {"position": 3}}
    (folder.final(9) / PROGRESS).write_text(json.dumps(good))
    assert read_progress(folder.final(9)) == good
    for bad in (good | {"step": step}, good | {"data": {"position": step or "x"}}):
        (folder.final(9) / PROGRESS).write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=r"progress\.json: "):
            read_progress(folder.final(9))


@pytest.mark.parametrize("value", [True, None, "0.5", float("nan"), [1]])
def test_a_best_value_that_is_none(folder: CheckpointFolder, value: object) -> None:
    (folder.path / "best.json").write_text(json.dumps({"step": 20, "metric": "mrr", "value": value}))
    with pytest.raises(CheckpointError, match=r"best\.json: has no step, value or metric"):
        folder.best()


def test_partial_ones_are_removed_and_nothing_else(folder: CheckpointFolder) -> None:
    folder.mark_best(9, "mrr", 0.1)
    folder.remove_partial()
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "best.json",
        "step-00000009",
        "step-00000020",
        "step-00000100",
    ]


def test_commit_shows_a_new_one_and_replaces_an_old_one(folder: CheckpointFolder) -> None:
    folder.commit(120)
    assert folder.steps() == [9, 20, 100, 120] and not folder.partial(120).exists()
    (folder.final(120) / "of the old one").write_text("")
    write(folder.partial(120), 120, "new")
    folder.commit(120)
    assert sorted(path.name for path in folder.final(120).iterdir()) == ["data", "progress.json"]
    assert (folder.final(120) / "data").read_text() == "new"


def test_best_is_replaced(folder: CheckpointFolder) -> None:
    folder.mark_best(9, "mrr", 0.1)
    folder.mark_best(20, "mrr", 0.2)
    assert folder.best() == {"step": 20, "metric": "mrr", "value": 0.2}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"5", b'{"step": 40}', b'{"step": 1, "metric": "m", "value": "x"}', b"\xff\x00"]
)
def test_a_best_json_that_gr_did_not_write(tmp_path: Path, content: bytes) -> None:
    (tmp_path / BEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best.json: .*; remove it, and the latest"):
        CheckpointFolder(tmp_path).best()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"step": "4", "data": {}}', b'{"step": 4, "data": 3}', b"\xff"]
)
def test_a_progress_json_that_gr_did_not_write(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PROGRESS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"progress\.json: "):
        read_progress(tmp_path)


def test_a_folder_without_progress_is_passed_over_and_named(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path)
    (whole := folder.final(9)).mkdir()
    (whole / "progress.json").touch()
    folder.final(20).mkdir()
    with caplog.at_level("WARNING", logger="gr"):
        assert folder.steps() == [9] and folder.latest() == whole
    assert f"{folder.final(20)}: passed over, since without progress.json it is no whole checkpoint" in caplog.text

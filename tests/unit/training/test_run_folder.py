"""The run folder: who may use it, and what status.json says of the ways in which a run ends."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

import gr
from gr.config import load_config
from gr.config.retrieval import RetrievalConfig
from gr.dist import World
from gr.errors import CheckpointError, ConfigError, DataError, GRError, TrainingError, TransientError
from gr.status import RunError, RunStatus, StatusFile, read_status
from gr.training.run_folder import run_folder, write_config
from gr.training.signals import Interrupted
from tests.support import ROOT
from tests.support.tiny import tiny_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def config(tmp_path: Path, run_dir: Path) -> RetrievalConfig:
    return tiny_config(tmp_path / "data", run_dir)


def ended(config: RetrievalConfig, world: World, error: BaseException) -> BaseException:
    with pytest.raises(type(error) if isinstance(error, GRError) else BaseException) as left, run_folder(config, world):
        assert read_status(Path(config.run_dir)).state == "running"
        raise error
    return left.value


def test_a_failure_is_recorded_with_its_rank(config: RetrievalConfig, run_dir: Path, alone: World) -> None:
    ended(config, alone, DataError("part-3 has gone"))
    status = read_status(run_dir)
    assert status.state == "failed" and status.error is not None
    assert (status.error.rank, status.error.message) == (0, "part-3 has gone")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), RuntimeError("connection closed")])
def test_a_crash_leaves_running_behind(
    config: RetrievalConfig, run_dir: Path, alone: World, error: BaseException
) -> None:
    assert ended(config, alone, error) is error
    assert read_status(run_dir).state == "running"


def test_a_broken_collective_is_explained_by_the_rank_that_failed(
    config: RetrievalConfig, run_dir: Path, alone: World
) -> None:
    with pytest.raises(TrainingError) as left, run_folder(config, alone):
        StatusFile(run_dir).fail(RunError(3, "h2", "part-3 has gone"))
        raise RuntimeError("connection closed by peer")
    assert str(left.value) == "rank 3 on h2 failed: part-3 has gone"
    assert read_status(run_dir).error == RunError(3, "h2", "part-3 has gone")


def test_a_full_disk_is_a_failure_with_a_remedy(config: RetrievalConfig, run_dir: Path, alone: World) -> None:
    left = ended(config, alone, OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(left, TrainingError) and "No space left on device: make room" in str(left)
    assert read_status(run_dir).state == "failed"


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_folder_that_is_removed_during_the_run(
    config: RetrievalConfig, run_dir: Path, alone: World, name: str
) -> None:
    with pytest.raises(TrainingError) as left, run_folder(config, alone):
        (run_dir / "checkpoints").mkdir()
        shutil.rmtree(gone := run_dir / name)
        (run_dir / "checkpoints" / "step-1").mkdir()
    assert str(left.value).startswith(f"{gone} was removed while the run wrote into it: start the same command again")


def test_a_path_in_the_run_folder_that_is_of_another_kind(config: RetrievalConfig, run_dir: Path, alone: World) -> None:
    with pytest.raises(TrainingError) as left, run_folder(config, alone):
        (run_dir / "checkpoints").touch()
        (run_dir / "checkpoints").mkdir()
    assert str(left.value) == f"{run_dir}/checkpoints: File exists; correct it, then start the same command again"
    assert read_status(run_dir).state == "failed"


def test_a_data_folder_is_no_run_folder(config: RetrievalConfig, run_dir: Path, alone: World) -> None:
    run_dir.mkdir()
    (run_dir / "schema.json").touch()
    with pytest.raises(ConfigError, match=r"is a data folder, as it has schema\.json; set another one"):  # noqa: SIM117
        with run_folder(config, alone):
            pass


def test_a_file_of_ours_that_is_missing_stays_a_crash(config: RetrievalConfig, alone: World) -> None:
    error = ended(config, alone, FileNotFoundError(errno.ENOENT, "No such file or directory", "/none/x"))
    assert isinstance(error, FileNotFoundError)


def test_a_spoilt_status_keeps_no_attempt_from_starting(
    config: RetrievalConfig, run_dir: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.mkdir()
    (run_dir / "status.json").write_text("garbage")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with run_folder(config, alone):
        assert read_status(run_dir).state == "running"


def test_torchrun_does_not_try_a_failure_again_and_a_person_may(
    config: RetrievalConfig, run_dir: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with run_folder(config, alone):  # the attempt before was killed while it imported torch, and said nothing
        pass
    ended(config, alone, DataError("part-3 has gone"))
    with pytest.raises(ConfigError, match="not tried again: part-3 has gone"), run_folder(config, alone):
        pass
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with run_folder(config, alone):
        assert read_status(run_dir).state == "running"


def test_a_second_run_is_refused_and_leaves_the_first_alone(
    config: RetrievalConfig, run_dir: Path, alone: World
) -> None:
    run_dir.mkdir()
    first = RunStatus("running", 7, 9, 1)
    StatusFile(run_dir).start(first)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TransientError, match="is in use by another run"), run_folder(config, alone):
            pass
    assert read_status(run_dir) == first


def test_a_crash_stays_one_though_torchrun_stops_what_is_left(
    config: RetrievalConfig, run_dir: Path, alone: World
) -> None:
    with pytest.raises(RuntimeError, match="connection closed by peer"), run_folder(config, alone):
        try:
            raise RuntimeError("connection closed by peer")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert read_status(run_dir).state == "running"


@pytest.mark.parametrize("error", [None, CheckpointError("wrapped"), RuntimeError("connection closed by peer")])
def test_a_stop_outside_the_steps(
    config: RetrievalConfig, run_dir: Path, alone: World, error: Exception | None
) -> None:
    """Also where a library made another error of it on its way."""
    with run_folder(config, alone):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            if error is None:
                raise
            raise error from None
    assert read_status(run_dir).state == "stopped"


def test_a_stop_of_another_rank_that_torch_tells_of(config: RetrievalConfig, run_dir: Path, alone: World) -> None:
    with run_folder(config, alone):
        raise Interrupted
    assert read_status(run_dir).state == "stopped"


def test_a_stop_after_the_end_changes_nothing(config: RetrievalConfig, run_dir: Path, alone: World) -> None:
    with run_folder(config, alone):
        StatusFile(run_dir).update(state="done")
        os.kill(os.getpid(), signal.SIGTERM)
    assert read_status(run_dir).state == "done"


def test_an_attempt_waits_for_the_ranks_of_the_one_before(
    config: RetrievalConfig, run_dir: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lost their torchrun, finish a step and save; a person's second run is refused at once."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    run_dir.mkdir()
    lock = (run_dir / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.5, lock.close).start()
    with run_folder(config, alone):
        assert read_status(run_dir).state == "running"


def test_a_folder_without_locks(config: RetrievalConfig, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"has no locks \(Function not implemented\)"), run_folder(config, alone):
        pass


def test_the_commit_of_an_image(
    config: RetrievalConfig, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image has no .git: it is built with the commit in its environment."""
    run_dir.mkdir()
    monkeypatch.setattr(gr, "__file__", f"{tmp_path}/gr/__init__.py")
    for commit, said in (("", ""), ("a" * 40, f", git {'a' * 40}")):
        monkeypatch.setenv("GR_COMMIT", commit)
        write_config(config)
        first = (run_dir / "config.yaml").read_text().splitlines()[0]
        assert first == f"# gr {gr.__version__}{said}"


def test_config_yaml_names_the_commit(config: RetrievalConfig, run_dir: Path) -> None:
    run_dir.mkdir()
    write_config(config)
    first = (run_dir / "config.yaml").read_text().splitlines()[0]
    assert first.startswith("# gr 0.")
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert f", git {head.stdout.strip()}" in first
    assert load_config(run_dir / "config.yaml") == config

"""The run folder: who may use it, and what status.json says of the ways in which a run ends."""

import errno
import fcntl
import subprocess
from pathlib import Path

import pytest

from gr.config import load_config
from gr.config.tree import ExperimentConfig
from gr.dist import World
from gr.errors import ConfigError, DataError, GRError, TrainingError
from gr.experiment.folder import run_folder, write_config
from gr.status import RunError, RunStatus, StatusFile, read_status
from tests.support import ROOT
from tests.support.tiny import tiny_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def config(tmp_path: Path, run_dir: Path) -> ExperimentConfig:
    return tiny_config(tmp_path / "data", run_dir)


def ended(config: ExperimentConfig, world: World, error: BaseException) -> BaseException:
    with pytest.raises(type(error) if isinstance(error, GRError) else BaseException) as left, run_folder(config, world):
        assert read_status(Path(config.run_dir)).state == "running"
        raise error
    return left.value


def test_a_failure_is_recorded_with_its_rank(config: ExperimentConfig, run_dir: Path, alone: World) -> None:
    ended(config, alone, DataError("part-3 has gone"))
    status = read_status(run_dir)
    assert status.state == "failed" and status.error is not None
    assert (status.error.rank, status.error.message) == (0, "part-3 has gone")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), RuntimeError("connection closed")])
def test_a_crash_leaves_running_behind(
    config: ExperimentConfig, run_dir: Path, alone: World, error: BaseException
) -> None:
    assert ended(config, alone, error) is error
    assert read_status(run_dir).state == "running"


def test_a_broken_collective_is_explained_by_the_rank_that_failed(
    config: ExperimentConfig, run_dir: Path, alone: World
) -> None:
    with pytest.raises(TrainingError) as left, run_folder(config, alone):
        StatusFile(run_dir).fail(RunError(3, "h2", "part-3 has gone"))
        raise RuntimeError("connection closed by peer")
    assert str(left.value) == "rank 3 on h2 failed: part-3 has gone"
    assert read_status(run_dir).error == RunError(3, "h2", "part-3 has gone")


def test_a_full_disk_is_a_failure_with_a_remedy(config: ExperimentConfig, run_dir: Path, alone: World) -> None:
    left = ended(config, alone, OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(left, TrainingError) and "No space left on device: make room" in str(left)
    assert read_status(run_dir).state == "failed"


def test_torchrun_does_not_try_a_failure_again_and_a_person_may(
    config: ExperimentConfig, run_dir: Path, alone: World, monkeypatch: pytest.MonkeyPatch
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
    config: ExperimentConfig, run_dir: Path, alone: World
) -> None:
    run_dir.mkdir()
    first = RunStatus("running", 7, 9, 1)
    StatusFile(run_dir).start(first)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by another run"), run_folder(config, alone):
            pass
    assert read_status(run_dir) == first


def test_config_yaml_names_the_commit(config: ExperimentConfig, run_dir: Path) -> None:
    run_dir.mkdir()
    write_config(config)
    first = (run_dir / "config.yaml").read_text().splitlines()[0]
    assert first.startswith("# gr 0.")
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert f", git {head.stdout.strip()}" in first
    assert load_config(run_dir / "config.yaml") == config

"""`gr calibrate`: the file and the table it makes, and wrong calls."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from gr.cli import main
from gr.cluster import calibrate
from gr.planner.topology import parse_topology

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _alone_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(calibrate, "CPU_LOAD", calibrate.Load(64, 32, 16, (1 << 10, 1 << 22), repeats=3))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "topology.yaml"


def test_one_rank(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--device", "cpu", "--out", str(out)]) == 0
    topology = parse_topology(str(out))
    assert (topology.name, topology.ranks) == ("cpu-measured", 1)
    assert "\nmeasured:\n  date: '20" in out.read_text()
    shown, progress = capsys.readouterr()
    assert "this machine, 1 ranks on 1 hosts, against cpu" in shown and shown.count("not measured") == 6 + 1
    assert "one rank measures no link: use --nproc, or torchrun on several hosts" in shown
    assert f"written: {out}; use it with gr plan --topology {out}" in shown
    assert progress.splitlines()[0] == "measuring row lookups"


def test_a_file_is_replaced_only_with_force(out: Path, refused: Refused) -> None:
    out.write_text("mine")
    said = refused("calibrate", "--device", "cpu", "--out", str(out))
    assert said == f"--out={out} exists: name another file, or replace it with --force" and out.read_text() == "mine"
    assert main(["calibrate", "--device", "cpu", "--out", str(out), "--force"]) == 0
    assert parse_topology(str(out)).name == "cpu-measured"


def test_wrong_calls(out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused("calibrate", "--device", "cpu", "--out", str(out), "--hardware", "h100")
    assert said == (
        "--hardware=h100 is of device cuda, and this measurement runs on cpu: set --device=cuda, or name hardware of "
        "device cpu"
    )
    assert "did you mean 'cpu'?" in refused("calibrate", "--device", "cpu", "--out", str(out), "--hardware", "cpus")
    said = refused("calibrate", "--out", str(out / "none" / "t.yaml"))
    assert said.endswith(f"there is no folder {out / 'none'}; make it first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused("calibrate", "--out", str(out), "--nproc", "2")
    assert said == "--nproc starts ranks, and so does torchrun: use one of them"
    assert not out.exists()


def test_several_ranks_are_started_by_torchrun(out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(arguments: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append((arguments, env))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    said = refused("calibrate", "--device", "cpu", "--out", str(out), "--nproc", "2")
    assert said == "calibrate: the 2 ranks failed with exit code 3; their own message is above"
    ((arguments, env),) = started
    assert arguments[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert arguments[5:9] == ["-m", "gr", "calibrate", "--out"] and arguments[-1] == "--force"
    assert "OMP_NUM_THREADS" in env


@pytest.mark.slow
def test_two_real_ranks(out: Path, python: Path) -> None:
    arguments = ["calibrate", "--device", "cpu", "--out", str(out), "--nproc", "2"]
    environment = {**os.environ, "PYTHON_EXEC": str(python)}
    done = subprocess.run([python, "-m", "gr", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (parse_topology(str(out)).ranks, "all-reduce has" in done.stdout) == (2, True)

"""`gr status`, as a person and as a script read it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gr.cli import main
from gr.cli.status import describe
from gr.status import RunError, RunStatus, StatusFile

HALF = RunStatus("running", step=50, steps=200, world_size=4, loss=1.25, seconds_per_step=2.0, checkpoint=40, updated=0)


@pytest.fixture
def run(tmp_path: Path) -> str:
    StatusFile(tmp_path).start(HALF)
    return str(tmp_path)


def test_what_a_person_reads() -> None:
    assert describe(HALF, "runs/x", now=65) == [
        "runs/x: running",
        "step        50/200 (25 %) on 4 rank(s)",
        "loss        1.2500",
        "speed       2 s/step, ETA 0:05:00 without evaluations",
        "checkpoint  step 40",
        "updated     0:01:05 ago",
    ]


def test_a_time_that_no_run_takes() -> None:
    """Of a status.json that something else changed: a number of seconds that no duration of Python can be."""
    shown = describe(replace(HALF, steps=2**62, seconds_per_step=1e300), "x", 65)
    assert "speed       1e+300 s/step, ETA over 300,000 years without evaluations" in shown


def test_how_long_a_save_takes() -> None:
    """For whoever sets the time that a scheduler gives to it."""
    saved = describe(replace(HALF, save_seconds=12.345), "x", 65)
    assert "checkpoint  step 40, the last save took 12.3 s" in saved


def test_a_failure_says_where_and_why() -> None:
    failed = RunStatus("failed", 0, 10, 2, updated=0, error=RunError(1, "h2", "no such file"))
    assert describe(failed, "x", 1)[-1] == "error       rank 1 on h2: no such file"
    assert "checkpoint  none" in describe(failed, "x", 1)


def test_what_a_script_reads(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", run, "--state"]) == 0
    assert capsys.readouterr().out == "running\n"
    assert main(["status", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path(run, "status.json").read_text())


def test_no_run_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("status", f"{tmp_path}/none").startswith(f"{tmp_path}/none/status.json: No such file or directory")


def test_it_needs_no_torch(run: str) -> None:
    """A login node may have none, and a script that asks every minute should not pay for it."""
    code = f"import sys; from gr.cli import main; main(['status', {run!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

"""Real processes, killed or asked to stop: the same command goes on from the last checkpoint and repeats the run."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gr.checkpoint import CheckpointFolder
from gr.cli import main
from gr.config import dump_config, load_config
from gr.dist import World
from gr.experiment import train
from gr.status import read_status
from tests.support import ROOT
from tests.support.gate import gate, gates
from tests.support.patience import PATIENCE_SECONDS, until
from tests.support.ranks import run_ranks
from tests.support.run_folder import losses
from tests.support.tiny import tiny_config, write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interruptions")]  # one worker makes what several resume
STEPS, EVERY = 26, 8
STOPPED, KILLED = EVERY + 3, 2 * EVERY + 3  # where runs stand when something is done to them


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    data = write_tiny(folder / "data")
    config = tiny_config(
        data,
        folder / "unused",
        trainer={"steps": STEPS},
        checkpoint={"every": EVERY},
        planner={"sharding": "row_wise"},
    )
    path = folder / "tiny.yaml"
    path.write_text(dump_config(config))
    return path


class Run:
    """`gr train` in a process, or under torchrun in several. What it prints is beside run_dir."""

    def __init__(
        self, python: Path, config: Path, run_dir: Path, ranks: int, *overrides: str, program=("-m", "gr", "train")
    ) -> None:
        self.python, self.run_dir, self.ranks = python, run_dir, ranks
        self._log = run_dir.with_suffix(".txt")
        # A file a rank: what two ranks print may arrive in pieces.
        apart = ["--redirects=3", f"--log-dir={run_dir.with_suffix('.logs')}"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *apart]
        launcher = [sys.executable, *torchrun] if ranks > 1 else [python]  # the ranks of torchrun are its children
        self._command = [*launcher, *program, str(config), f"run_dir={run_dir}", *overrides]
        self.start()

    def start(self) -> None:
        """The same command, also after an end."""
        shutil.rmtree(self.run_dir.with_suffix(".logs"), ignore_errors=True)
        with self._log.open("w") as log:
            ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": str(self.python)}
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env={**os.environ, **ours})

    @property
    def outputs(self) -> list[str]:
        """What each rank has printed in this attempt, in rank order."""
        if self.ranks == 1:
            return [self._log.read_text()]
        logs = self.run_dir.with_suffix(".logs")
        return [
            "".join(log.read_text() for log in logs.glob(f"*/attempt_0/{rank}/*.log")) for rank in range(self.ranks)
        ]

    @property
    def output(self) -> str:
        return "\n".join([self._log.read_text(), *self.outputs])

    def until(self, what: str, there: Callable[[], object]) -> None:
        until(what, there, report=lambda: self.output, alive=lambda: self.process.poll() is None)

    def until_step(self, step: int) -> None:
        self.until(f"at step {step}", lambda: any(done >= step for done, _ in losses(self.run_dir)))

    def end(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_SECONDS)

    def saved(self) -> list[int]:
        return CheckpointFolder(self.run_dir / "checkpoints").steps()


def workers_of(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


def whole_run(world: World, config: Path, folder: Path) -> list[tuple[int, float]]:
    run_dir = folder / str(world.size)
    train(load_config(str(config), [f"run_dir={run_dir}"]), world)
    return losses(run_dir)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> dict[int, dict[int, float]]:
    """Losses by step of whole runs, by number of ranks."""
    folder = tmp_path_factory.mktemp("whole")
    return {ranks: dict(run_ranks(whole_run, ranks, config, folder)[0]) for ranks in (1, 2)}


@pytest.fixture(scope="module")
def stopped(python, config, tmp_path_factory) -> Path:
    """The run folder of 2 ranks whose torchrun got a SIGTERM: it passes that on and then exits with 1, whatever its
    ranks return."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Run(python, config, folder / "run", 2, *gates(folder, STOPPED))
    run.until_step(STOPPED)
    run.process.send_signal(signal.SIGTERM)
    run.end()
    last = losses(run.run_dir)[-1][0]
    assert run.saved()[-1] == last < STEPS, run.output
    return run.run_dir


def test_kill_9_of_a_rank_loses_only_the_steps_since_the_last_checkpoint(
    python, config, tmp_path, stopped, uninterrupted
):
    """The run had been stopped by a SIGTERM to torchrun before, and resumes from there first."""
    run_dir = tmp_path / "killed"
    shutil.copytree(stopped, run_dir)
    run = Run(python, config, run_dir, 2, *gates(tmp_path, KILLED))
    run.until_step(KILLED)
    assert losses(run_dir) == [(step, uninterrupted[2][step]) for step in range(1, KILLED + 1)], "no step ran twice"
    os.kill(workers_of(run.process)[-1], signal.SIGKILL)
    assert run.end() != 0
    reached, saved = losses(run_dir)[-1][0], run.saved()[-1]
    assert (reached, saved) == (KILLED, KILLED - KILLED % EVERY)
    gate(tmp_path, KILLED).touch()
    run.start()
    assert run.end() == 0, run.output
    assert f"step-{saved:08d}" in run.output
    after_restart = losses(run_dir)[len(losses(run_dir)) - (STEPS - saved) :]
    assert after_restart == [(step, uninterrupted[2][step]) for step in range(saved + 1, STEPS + 1)]
    assert dict(losses(run_dir)) == uninterrupted[2]


def test_sigterm_saves_and_exits_0_and_the_same_command_resumes(python, config, tmp_path, uninterrupted):
    run = Run(python, config, tmp_path / "stopped", 1, *gates(tmp_path, STOPPED))
    run.until_step(STOPPED)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0, run.output
    last = losses(run.run_dir)[-1][0]
    assert run.saved()[-1] == last < STEPS
    assert f"stopped after step {last}; the same command resumes there" in run.output
    run.start()
    assert run.end() == 0, run.output
    assert dict(losses(run.run_dir)) == uninterrupted[1]
    assert [step for step, _ in losses(run.run_dir)] == list(range(1, STEPS + 1)), "no step may run twice"


SLOW_PLAN = """
import sys, time
from pathlib import Path
import gr.experiment
from gr.cli import main

here = Path(__file__).parent

def make_plan(model, inventory, config, world):
    (here / f"planning-{world.rank}").touch()
    if world.is_main:
        time.sleep(3600)
    world.from_main("the plan")

gr.experiment.make_plan = make_plan
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_stop_while_rank_0_plans_and_the_others_wait(python, config, tmp_path):
    """A rank in a collective hears the signal when the rank that it waits for has left."""
    (tmp_path / "train.py").write_text(SLOW_PLAN)
    run = Run(python, config, tmp_path / "planning", 2, program=[str(tmp_path / "train.py")])
    run.until("planning", lambda: all((tmp_path / f"planning-{rank}").exists() for rank in range(2)))
    run.process.send_signal(signal.SIGTERM)
    run.end()
    assert read_status(run.run_dir).state == "stopped", run.output
    assert ["stopped outside the steps" in output for output in run.outputs] == [True, True], run.output


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(config, tmp_path, monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "diverged"
    rates = ["optimizer.lr=1e12", "optimizer.schedule.kind=linear", f"optimizer.schedule.warmup_steps={EVERY * 2}"]
    command = ["train", str(config), f"run_dir={run_dir}", *rates, "task.l2_norm=false", "checkpoint.every=1"]
    assert main(command) == 2
    shown = capfd.readouterr().err
    message = next(line for line in shown.splitlines() if line.startswith("error:"))
    assert "loss is not finite at step" in message and "examples" in message and "learning rate" in message
    failed_at = int(message.split("at step ")[1].split(":")[0])
    saved = CheckpointFolder(run_dir / "checkpoints").steps()
    assert saved and saved[-1] <= failed_at
    assert "Traceback" not in shown


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(python, config, tmp_path, stopped, uninterrupted):
    run_dir = tmp_path / "damaged"
    shutil.copytree(stopped, run_dir)
    folder = CheckpointFolder(run_dir / "checkpoints")
    before, last = folder.steps()[-2:]
    file = sorted(folder.final(last).glob("__1_*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = Run(python, config, run_dir, 2, *gates(tmp_path))
    assert run.end() == 0, run.output
    assert f"warning: {file}: is not what was written (checksum)" in run.output
    assert f"resumed from {folder.final(before)}" in run.output
    assert (folder.path / f"step-{last:08d}.damaged").is_dir()
    assert dict(losses(run_dir)) == uninterrupted[2]

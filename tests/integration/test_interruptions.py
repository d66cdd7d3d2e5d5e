"""Real processes, killed or asked to stop: the same command goes on from the last checkpoint and repeats the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gr.checkpoint import CheckpointFolder
from gr.config import dump_config
from gr.status import read_status
from tests.support.tiny import tiny_config, write_tiny

STEPS, EVERY = 300, 20
PATIENCE_SECONDS = 120


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


def command(config: Path, run_dir: Path, ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "gr", "train", str(config), f"run_dir={run_dir}"]


def start(config: Path, run_dir: Path, ranks: int) -> subprocess.Popen:
    return subprocess.Popen(
        command(config, run_dir, ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def records(run_dir: Path) -> list[tuple[int, float]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in parsed if line["kind"] == "train"]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(done >= step for done, _ in records(run_dir)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no step {step}:\n{process.communicate()[0]}")
        time.sleep(0.005)


def workers_of(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> dict[int, dict[int, float]]:
    """Losses by step of whole runs, by number of ranks."""
    losses = {}
    for ranks in (1, 2):
        run_dir = tmp_path_factory.mktemp("whole") / str(ranks)
        process = start(config, run_dir, ranks)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, output
        losses[ranks] = dict(records(run_dir))
    return losses


def test_kill_9_of_a_rank_loses_only_the_steps_since_the_last_checkpoint(config, tmp_path, uninterrupted):
    run_dir = tmp_path / "killed"
    process = start(config, run_dir, 2)
    wait_for_step(process, run_dir, 3 * EVERY + 3)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    reached = records(run_dir)[-1][0]
    saved = CheckpointFolder(run_dir / "checkpoints").steps()[-1]
    assert saved >= reached - reached % EVERY - EVERY and saved % EVERY == 0
    again = start(config, run_dir, 2)
    output, _ = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, output
    assert f"step-{saved:08d}" in output
    after_restart = records(run_dir)[len(records(run_dir)) - (STEPS - saved) :]
    assert after_restart == [(step, uninterrupted[2][step]) for step in range(saved + 1, STEPS + 1)]


def test_sigterm_saves_and_exits_0_and_the_same_command_resumes(config, tmp_path, uninterrupted):
    run_dir = tmp_path / "stopped"
    process = start(config, run_dir, 1)
    wait_for_step(process, run_dir, EVERY + 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    last = records(run_dir)[-1][0]
    assert CheckpointFolder(run_dir / "checkpoints").steps()[-1] == last < STEPS
    assert f"stopped after step {last}; the same command resumes there" in output
    again = start(config, run_dir, 1)
    output, _ = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, output
    assert dict(records(run_dir)) == uninterrupted[1]
    assert [step for step, _ in records(run_dir)] == list(range(1, STEPS + 1)), "no step may run twice"


def test_sigterm_to_torchrun_saves_on_all_ranks(config, tmp_path, uninterrupted):
    """torchrun passes the signal on and then exits with 1, whatever its ranks return."""
    run_dir = tmp_path / "stopped"
    process = start(config, run_dir, 2)
    wait_for_step(process, run_dir, EVERY + 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    last = records(run_dir)[-1][0]
    assert CheckpointFolder(run_dir / "checkpoints").steps()[-1] == last < STEPS
    again = start(config, run_dir, 2)
    output, _ = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, output
    assert dict(records(run_dir)) == uninterrupted[2]


SLOW_PLAN = """
import sys, time
import gr.experiment.run
from gr.cli import main

def make_plan(model, inventory, config, world):
    if world.is_main:
        time.sleep(600)
    world.from_main("the plan")

gr.experiment.run.make_plan = make_plan
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_stop_while_rank_0_plans_and_the_others_wait(config, tmp_path):
    """A rank in a collective hears the signal when the rank that it waits for has left."""
    run_dir, script = tmp_path / "planning", tmp_path / "train.py"
    script.write_text(SLOW_PLAN)
    torchrun = command(config, run_dir, 2)[: -len(["-m", "gr", "train", "config", "run_dir"])]
    process = subprocess.Popen(
        [*torchrun, str(script), str(config), f"run_dir={run_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (run_dir / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # into the plan
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert read_status(run_dir).state == "stopped", output
    assert time.monotonic() - asked < 15, "torchrun kills its ranks after 30 s"
    assert output.count("stopped outside the steps") == 2, output


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(config, tmp_path):
    run_dir = tmp_path / "diverged"
    rates = ["optimizer.lr=1e30", "optimizer.schedule.kind=linear", f"optimizer.schedule.warmup_steps={EVERY * 10}"]
    result = subprocess.run(
        [*command(config, run_dir, 1), *rates, "task.l2_norm=false"], capture_output=True, text=True
    )
    assert result.returncode == 2, result.stdout + result.stderr
    message = next(line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert "loss is not finite at step" in message and "examples" in message and "learning rate" in message
    failed_at = int(message.split("at step ")[1].split(":")[0])
    assert all(step <= failed_at for step in CheckpointFolder(run_dir / "checkpoints").steps())
    assert "Traceback" not in result.stderr


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(config, tmp_path, uninterrupted):
    run_dir = tmp_path / "damaged"
    process = start(config, run_dir, 2)
    wait_for_step(process, run_dir, 3 * EVERY + 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    folder = CheckpointFolder(run_dir / "checkpoints")
    before, last = folder.steps()[-2:]
    file = sorted(folder.final(last).glob("__1_*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = start(config, run_dir, 2)
    output, _ = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, output
    assert f"warning: {file}: is not what was written (checksum)" in output
    assert f"resumed from {folder.final(before)}" in output
    assert (folder.path / f"step-{last:08d}.damaged").is_dir()
    assert dict(records(run_dir)) == uninterrupted[2]

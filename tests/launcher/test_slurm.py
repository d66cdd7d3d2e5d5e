"""A real Slurm of two hosts takes our jobs, and they survive what it does to them."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from gr.checkpoint import CheckpointFolder
from tests.launcher import job
from tests.launcher.job import EVERY, STEPS
from tests.launcher.slurm import Slurm

pytestmark = pytest.mark.slow
# Slurm may end the new task of a host that is back for the old one's sake: the other then waits launch.node's 300 s.
PATIENCE_SECONDS = 540
SLOT = ("--time=30", "--signal=B:USR1@5")  # the warning comes 5 to 35 s before the limit
BUSY = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED", "CONFIGURING")


class Submission:
    """A job of the cluster: train.sbatch on both hosts, one rank each."""

    def __init__(
        self,
        cluster: Slurm,
        workspace: Path,
        config: Path | str,
        run_dir: Path,
        *overrides: str,
        options=(),
        environment=("GR_NODE_OPTIONS=--no-preflight",),
    ) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        script = ["--nodes=2", *options, "launch/slurm/train.sbatch", str(config), f"run_dir={run_dir}", *overrides]
        self.id = cluster.login(workspace, "env", *environment, "sbatch", "--parsable", *script).stdout.strip()
        assert self.id.isdigit(), self.id
        self._output = workspace / f"slurm-{self.id}.out"

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    @property
    def step(self) -> int:
        return job.status(self.run_dir).get("step", 0)

    def until(self, what: str, there) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not there():
            if time.monotonic() > deadline:
                raise AssertionError(f"job {self.id}: not {what} after {PATIENCE_SECONDS} s\n{self.output}")
            time.sleep(0.1)

    def limit(self, minutes: int) -> None:
        self.cluster.slurm("scontrol", "update", f"jobid={self.id}", f"timelimit={minutes}")

    def limit_soon(self) -> None:
        """To the minute that is 45 s away at least: Slurm counts whole ones, and looks at them every 30 s."""
        hours, minutes, seconds = map(int, self.cluster.field(self.id, "RunTime").split(":"))
        self.limit(minutes=60 * hours + minutes + (seconds + 45) // 60 + 1)

    def end(self) -> str:
        """Its state once it has left the queue."""
        self.until("at an end", lambda: self.cluster.state(self.id) not in BUSY)
        return self.cluster.state(self.id)


def test_torchx_submits_and_shows_status_and_logs(cluster, workspace, experiment, whole, tmp_path):
    pytest.importorskip("torchx", reason="needs torchx: the extra launch")
    run_dir = tmp_path / "run"
    component = ["launch/components.py:train", "--config", str(experiment), "--nnodes", "2", "--resource", "cpux1"]
    options = ["-s", "slurm", "-cfg", "partition=debug,time=10", "--wait"]
    done = cluster.login(workspace, "torchx", "run", *options, *component, "--", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    handle = done.stdout.split()[0]
    assert re.fullmatch(r"slurm://torchx/\d+", handle)
    assert "State: SUCCEEDED" in cluster.login(workspace, "torchx", "status", handle).stdout
    log = cluster.login(workspace, "torchx", "log", handle).stdout
    assert f"step {STEPS}/{STEPS}" in log
    assert f"{run_dir}: done" in cluster.login(workspace, "gr", "status", str(run_dir)).stdout
    assert dict(job.losses(run_dir)) == whole


def test_preempted_job_saves_and_resumes(cluster, workspace, experiment, whole, tmp_path):
    ours = Submission(cluster, workspace, experiment, tmp_path / "run")
    ours.until("training", lambda: ours.step > 0)
    cluster.login(workspace, "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 2")
    assert ours.end() == "COMPLETED", ours.output
    assert "back into the queue" in ours.output and "attempt 1" in ours.output
    assert job.losses(ours.run_dir) == list(whole.items()), "every step once, and its loss that of the whole run"


@pytest.mark.parametrize(("host", "fault"), [("n1", "power"), ("n2", "link")])
def test_job_outlives_the_loss_of_a_host(cluster, workspace, experiment, whole, tmp_path, host, fault):
    """n1 has rank 0 and the rendezvous. Slurm hears nothing of a lost host, and finds out after SlurmdTimeout."""
    ours = Submission(cluster, workspace, experiment, tmp_path / "run")
    ours.until("past a checkpoint", lambda: ours.step > EVERY)
    cluster.link(host, "down")
    if fault == "power":
        cluster.kill(host)
    ours.until("queued again", lambda: cluster.state(ours.id) in ("PENDING", "REQUEUED") or "attempt 1" in ours.output)
    saved = CheckpointFolder(ours.run_dir / "checkpoints").steps()[-1]
    cluster.link(host, "up")
    if fault == "power":
        cluster.boot(host)
    assert ours.end() == "COMPLETED", ours.output
    losses = job.losses(ours.run_dir)
    assert dict(losses) == whole
    assert losses[-(STEPS - saved) :] == [(step, whole[step]) for step in range(saved + 1, STEPS + 1)]


def test_time_limit_chains_and_a_cancelled_job_stays_cancelled(cluster, workspace, experiment, whole, tmp_path):
    ours = Submission(cluster, workspace, experiment, tmp_path / "run", "trainer.steps=100000", options=SLOT)
    ours.until("training", lambda: ours.step > 0)
    ours.limit_soon()
    ours.until("stopped by the time limit", lambda: "back into the queue" in ours.output)
    saved = job.status(ours.run_dir)
    assert "time is nearly up" in ours.output
    assert (saved["state"], saved["checkpoint"]) == ("stopped", saved["step"])
    ours.limit(minutes=30)
    ours.until("training again", lambda: ours.step > saved["step"])
    attempts = ours.output.count("attempt ")
    cluster.login(workspace, "scancel", ours.id)
    assert ours.end() == "CANCELLED"
    assert job.status(ours.run_dir)["state"] == "stopped"
    time.sleep(8)  # longer than a requeued job waits here before it starts (cred_expire)
    assert cluster.state(ours.id) == "CANCELLED" and ours.output.count("attempt ") == attempts
    losses = job.losses(ours.run_dir)
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1)), "every step once"
    assert losses[:STEPS] == list(whole.items())[: len(losses)]


def test_a_save_that_never_ends_costs_steps_and_not_the_job(cluster, workspace, experiment, whole, tmp_path):
    ours = Submission(cluster, workspace, experiment, tmp_path / "run", options=SLOT)
    ours.until("past a checkpoint", lambda: ours.step > EVERY)
    for process in Path("/proc").glob("[0-9]*"):
        if _is_rank(process, ours.run_dir):
            os.kill(int(process.name), signal.SIGSTOP)
    stood = ours.step
    ours.limit_soon()
    ours.until("queued again", lambda: "not saved in time: back into the queue" in ours.output)
    assert "time is nearly up" in ours.output and stood < STEPS
    ours.limit(minutes=30)
    assert ours.end() == "COMPLETED", ours.output
    assert dict(job.losses(ours.run_dir)) == whole


def _is_rank(process: Path, run_dir: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return words[1:5] == ["-u", "-m", "gr", "train"] and f"run_dir={run_dir}" in words


def test_a_fault_that_stays_is_not_tried_again(cluster, workspace, experiment, tmp_path):
    diverges = ["optimizer.lr=1e30", "task.l2_norm=false"]
    ours = Submission(cluster, workspace, experiment, tmp_path / "run", *diverges, environment=())
    assert ours.end() == "FAILED", ours.output
    assert "failed: not queued again" in ours.output and "attempt 1" not in ours.output
    assert "loss is not finite" in job.status(ours.run_dir)["error"]["message"]


def test_a_configuration_that_the_nodes_do_not_have(cluster, workspace, tmp_path):
    ours = Submission(cluster, workspace, "configs/none.yaml", tmp_path / "run")
    assert ours.end() == "FAILED", ours.output
    assert f"error: n2: configs/none.yaml is not here, in {workspace}" in ours.output
    assert "Traceback" not in ours.output


def test_a_folder_that_the_nodes_do_not_have(cluster, workspace, experiment, tmp_path):
    """Nor the environment: there is no launch.node to import."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm").symlink_to(workspace / "launch" / "slurm")
    ours = Submission(cluster, tmp_path, experiment, tmp_path / "run", environment=("-u", "PYTHONPATH"))
    assert ours.end() == "FAILED", ours.output
    assert f"error: n2: no launch.node in {tmp_path} with " in ours.output
    assert "failed: not queued again" in ours.output

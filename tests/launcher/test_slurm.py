"""A real Slurm takes our jobs, and they survive what it does to them."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gr.checkpoint import CheckpointFolder
from tests.launcher import job
from tests.launcher.job import EVERY, HELD, STEPS
from tests.launcher.slurm import Slurm
from tests.support.gate import gate, gates
from tests.support.patience import until

pytestmark = pytest.mark.cluster
# Slurm may end the new task of a host that is back for the old one's sake: the other waits for it in vain, for a minute
# here and not for launch.node's five.
OPTIONS = "--no-preflight --join-timeout=60"
HOSTS, OTHER_HOSTS = "--nodelist=n1,n2", "--nodelist=n3,n4"
SLOT = ("--time=30", "--signal=B:USR1@15")  # the warning comes 15 to 45 s before the limit
BUSY = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED", "CONFIGURING")


class Submission:
    """A job of the cluster: train.sbatch on two hosts, one rank each. held: the steps after which it stands still."""

    def __init__(
        self,
        cluster: Slurm,
        workspace: Path,
        config: Path | str,
        run_dir: Path,
        *overrides: str,
        held=(),
        options=(HOSTS,),
        environment=(f"GR_NODE_OPTIONS={OPTIONS}",),
    ) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        train = [str(config), f"run_dir={run_dir}", *overrides, *(gates(run_dir.parent, *held) if held else ())]
        script = ["--nodes=2", *options, "launch/slurm/train.sbatch", *train]
        self.id = cluster.login(workspace, "env", *environment, "sbatch", "--parsable", *script).stdout.strip()
        assert self.id.isdigit(), self.id
        self._output = workspace / f"slurm-{self.id}.out"

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def until(self, what: str, there) -> None:
        until(f"{what}: job {self.id}", there, report=lambda: self.output)

    def until_held(self, step: int = HELD) -> None:
        """status.json tells of a step when all callbacks are done, so of the one before."""
        self.until(f"held after step {step}", lambda: job.step(self.run_dir) == step - 1)

    def go_on(self, step: int = HELD) -> None:
        """Opens the gate, also for attempts to come."""
        gate(self.run_dir.parent, step).touch()

    def limit(self, minutes: int) -> None:
        self.cluster.slurm("scontrol", "update", f"jobid={self.id}", f"timelimit={minutes}")

    def limit_soon(self) -> None:
        """To the minute that is 50 s away at least: Slurm counts whole ones, and looks at them every 30 s."""
        hours, minutes, seconds = map(int, self.cluster.field(self.id, "RunTime").split(":"))
        self.limit(minutes=60 * hours + minutes + (seconds + 50) // 60 + 1)

    def end(self) -> str:
        """Its state once it has left the queue."""
        self.until("at an end", lambda: self.cluster.state(self.id) not in BUSY)
        return self.cluster.state(self.id)


@pytest.fixture(autouse=True)
def _empty_queue(cluster) -> Iterator[None]:
    """A job that a failed test left at a gate does not keep its hosts from the next one."""
    yield
    cluster.slurm("scancel", "--user=root")


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
    ours = Submission(cluster, workspace, experiment, tmp_path / "run", held=[HELD])
    ours.until_held()
    urgent = ["--partition=urgent", HOSTS, "--exclusive"]
    cluster.login(workspace, "sbatch", *urgent, "--wrap", "sleep 2")
    assert ours.end() == "COMPLETED", ours.output
    assert "back into the queue" in ours.output and "attempt 1" in ours.output
    assert job.losses(ours.run_dir) == list(whole.items()), "every step once, and its loss that of the whole run"


@pytest.mark.parametrize(("host", "fault"), [("n1", "power"), pytest.param("n2", "link", marks=pytest.mark.full)])
def test_job_outlives_the_loss_of_a_host(cluster, workspace, experiment, whole, tmp_path, host, fault):
    """n1 has rank 0 and the rendezvous. Slurm hears nothing of a lost host, and finds out after SlurmdTimeout."""
    ours = Submission(cluster, workspace, experiment, tmp_path / "run", held=[HELD])
    ours.until_held()
    cluster.link(host, "down")
    if fault == "power":
        cluster.kill(host)
    ours.until("queued again", lambda: cluster.state(ours.id) in ("PENDING", "REQUEUED") or "attempt 1" in ours.output)
    saved = CheckpointFolder(ours.run_dir / "checkpoints").steps()[-1]
    assert saved == EVERY
    ours.go_on()
    cluster.link(host, "up")
    if fault == "power":
        cluster.boot(host)
    assert ours.end() == "COMPLETED", ours.output
    losses = job.losses(ours.run_dir)
    assert dict(losses) == whole
    assert losses[-(STEPS - saved) :] == [(step, whole[step]) for step in range(saved + 1, STEPS + 1)]


@pytest.mark.full
def test_two_jobs_at_their_time_limits(cluster, workspace, experiment, whole, tmp_path):
    """One saves in time, goes on, is cancelled and stays so. A save of the other never ends: that costs it steps, and
    not the job. Both limits are waited for at the same time."""
    chained = Submission(
        cluster, workspace, experiment, tmp_path / "chained/run", held=[HELD, HELD + EVERY], options=[HOSTS, *SLOT]
    )
    stuck = Submission(
        cluster, workspace, experiment, tmp_path / "stuck/run", held=[HELD], options=[OTHER_HOSTS, *SLOT]
    )
    for each in (chained, stuck):
        each.until_held()
    for process in Path("/proc").glob("[0-9]*"):
        if _is_rank(process, stuck.run_dir):
            os.kill(int(process.name), signal.SIGSTOP)
    for each in (chained, stuck):
        each.limit_soon()

    chained.until("stopped by the time limit", lambda: "back into the queue" in chained.output)
    saved = job.status(chained.run_dir)
    assert "time is nearly up" in chained.output
    assert (saved["state"], saved["checkpoint"]) == ("stopped", saved["step"])
    chained.limit(minutes=30)

    stuck.until("queued again", lambda: "not saved in time: back into the queue" in stuck.output)
    # Slurm wakes what it ends, so that the save may yet come to its end.
    assert "time is nearly up" in stuck.output and job.step(stuck.run_dir) in (HELD - 1, HELD)
    stuck.go_on()
    stuck.limit(minutes=30)

    chained.until_held(HELD + EVERY)
    attempts = chained.output.count("attempt ")
    cluster.login(workspace, "scancel", chained.id)
    # Its script has ended by then, so nobody is left to queue it again.
    assert chained.end() == "CANCELLED"
    assert "cancelled: not queued again" in chained.output and chained.output.count("attempt ") == attempts
    assert job.status(chained.run_dir)["state"] == "stopped"
    losses = job.losses(chained.run_dir)
    assert losses == list(whole.items())[: len(losses)], "every step once"
    assert len(losses) > HELD

    assert stuck.end() == "COMPLETED", stuck.output
    assert dict(job.losses(stuck.run_dir)) == whole


def _is_rank(process: Path, run_dir: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return words[1:5] == ["-u", "-m", "gr", "train"] and f"run_dir={run_dir}" in words


def test_a_fault_that_stays_is_not_tried_again(cluster, workspace, experiment, tmp_path):
    diverges = ["optimizer.lr=1e38", "task.l2_norm=false"]
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

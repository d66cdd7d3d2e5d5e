"""An elastic job (torchrun MIN:MAX) loses a host and gets one back: it plans anew, reshards, resumes, learns the same.

The hosts are torchrun agents on this machine; tests/launcher has them in network namespaces.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gr.cli import main
from gr.config import dump_config, load_config
from gr.dist import World
from gr.experiment import train
from gr.status import read_status
from tests.support import ROOT
from tests.support.gate import gates
from tests.support.patience import PATIENCE_SECONDS, until
from tests.support.ranks import run_ranks
from tests.support.run_folder import losses
from tests.support.tiny import tiny_config, write_tiny

# The run stands at HELD whenever it gets there; only a host that joins, and so stops the ranks, lets it go on.
STEPS, EVERY, HELD = 30, 8, 13
LOSS = 1e-3  # summation order, over all steps


class Agent:
    """torchrun on one host, with one rank; its log is NAME.txt."""

    def __init__(self, name: str, folder: Path, port: int, command: list[str], python: Path) -> None:
        self.log = folder / f"{name}.txt"
        launcher = [
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            "--rdzv-id=elastic",
        ]
        meet = [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", "--rdzv-conf=last_call_timeout=2"]
        # Without the last, torchrun lets nobody join again after a host was lost.
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": str(python)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launcher, *meet, "-m", "gr", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ours, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )

    def kill(self) -> None:
        """As a host that loses power: the agent and its rank at once."""
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        for pid in (self.process.pid, *(int(pid) for pid in children.stdout.split())):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Job:
    """The agents of one job, and the run folder that they share."""

    def __init__(self, folder: Path, port: int, run_dir: Path, command: list[str], python: Path) -> None:
        self.folder, self.port, self.run_dir, self.command, self.python = folder, port, run_dir, command, python
        self.agents: list[Agent] = []

    def add(self, name: str) -> None:
        self.agents.append(Agent(name, self.folder, self.port, self.command, self.python))

    def until(self, what: str, there: Callable[[], object]) -> None:
        until(what, there, report=self._logs, alive=lambda: self.agents[0].process.poll() is None)

    def trains_on(self, world_size: int) -> bool:
        """Whether it has done steps on that many ranks."""
        if not (self.run_dir / "status.json").exists():
            return False
        status = read_status(self.run_dir)
        return status.world_size == world_size and status.loss is not None

    def end(self) -> None:
        for agent in self.agents:
            if agent.process.poll() is None:
                agent.process.terminate()
                agent.process.wait(PATIENCE_SECONDS)

    def _logs(self) -> str:
        return "\n".join(agent.log.read_text()[-3000:] for agent in self.agents)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def whole_run(world: World, config: Path) -> list[tuple[int, float]]:
    loaded = load_config(str(config))
    train(loaded, world)
    return losses(Path(loaded.run_dir))


@pytest.mark.slow
def test_a_host_goes_and_comes_back(tmp_path: Path, python: Path) -> None:
    data = write_tiny(tmp_path / "data")
    config = tiny_config(
        data,
        tmp_path / "whole",
        trainer={"steps": STEPS},
        checkpoint={"every": EVERY},
        planner={"sharding": "row_wise"},
    )
    (path := tmp_path / "tiny.yaml").write_text(dump_config(config))
    alone = dict(run_ranks(whole_run, 1, path)[0])
    assert main(["plan", str(path), "--topology=cpux2", f"--json={tmp_path / 'two.json'}"]) == 0

    run_dir = tmp_path / "elastic"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    plan = [f"planner.plan={tmp_path / 'two.json'}", "planner.replan=true"]
    command = ["train", str(path), f"run_dir={run_dir}", *plan, *gates(tmp_path, HELD)]
    job = Job(tmp_path, port, run_dir, command, python)
    try:
        job.add("h1")
        job.until("meeting at h1", lambda: answers(port))  # the first holds the store, and is not the one to die
        job.add("h2")
        job.until("training on both", lambda: job.trains_on(2) and read_status(run_dir).step == HELD - 1)
        job.agents[1].kill()
        job.until("training on one", lambda: job.trains_on(1) and read_status(run_dir).step == HELD - 1)
        job.add("h2-again")
        job.until("training on both again", lambda: job.trains_on(2))
        job.until("done", lambda: read_status(run_dir).state == "done")
    finally:
        job.end()
    elastic = losses(run_dir)
    assert [step for step, _ in elastic] == list(alone) == list(range(1, STEPS + 1))
    assert max(abs(loss - alone[step]) for step, loss in elastic) < LOSS
    assert read_status(run_dir).world_size == 2
    assert "is for 2 ranks, and there are 1: making a plan" in job.agents[0].log.read_text()

"""An elastic job (torchrun MIN:MAX) loses a host and gets one back: it plans anew, reshards, resumes, learns the same.

The hosts are torchrun agents on this machine; tests/launcher has them in network namespaces.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gr.config import dump_config
from gr.status import read_status
from tests.integration.test_interruptions import records
from tests.support.tiny import tiny_config, write_tiny

STEPS, EVERY = 400, 10
PATIENCE_SECONDS = 300
LOSS = 1e-3  # summation order, over all steps


class Agent:
    """torchrun on one host, with one rank; its log is NAME.txt."""

    def __init__(self, name: str, folder: Path, port: int, command: list[str]) -> None:
        self.log = folder / f"{name}.txt"
        launcher = [
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            "--rdzv-id=elastic",
        ]
        meet = [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", "--rdzv-conf=last_call_timeout=2"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launcher, *meet, "-m", "gr", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                # Without the second, torchrun lets nobody join again after a host was lost.
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )

    def kill(self) -> None:
        """As a host that loses power: the agent and its rank at once."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        for pid in (self.process.pid, *(int(pid) for pid in found.stdout.split())):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def wait_for(condition: Callable[[], bool], agents: list[Agent]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("\n".join(agent.log.read_text()[-3000:] for agent in agents))
        time.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def progressed(run_dir: Path, world_size: int, after: float) -> bool:
    """Whether a step was logged on that many ranks since `after`."""
    if not (run_dir / "status.json").exists():
        return False
    status = read_status(run_dir)
    return status.world_size == world_size and status.updated > after and status.loss is not None


@pytest.mark.slow
def test_a_host_goes_and_comes_back(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data")
    config = tiny_config(
        data,
        tmp_path / "whole",
        trainer={"steps": STEPS},
        checkpoint={"every": EVERY},
        planner={"sharding": "row_wise"},
    )
    (path := tmp_path / "tiny.yaml").write_text(dump_config(config))
    gr = [sys.executable, "-m", "gr"]
    subprocess.run([*gr, "train", str(path)], check=True, capture_output=True)
    plan = tmp_path / "two.json"
    subprocess.run([*gr, "plan", str(path), "--topology=cpux2", f"--json={plan}"], check=True, capture_output=True)

    run_dir = tmp_path / "elastic"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["train", str(path), f"run_dir={run_dir}", f"planner.plan={plan}", "planner.replan=true"]
    agents = [Agent("h1", tmp_path, port, command)]
    try:
        wait_for(lambda: answers(port), agents)  # the first holds the store, and is not the one to die
        agents.append(Agent("h2", tmp_path, port, command))
        wait_for(lambda: progressed(run_dir, 2, 0.0), agents)
        killed = time.time()
        agents[1].kill()
        wait_for(lambda: progressed(run_dir, 1, killed), agents)
        back = time.time()
        agents.append(Agent("h2-again", tmp_path, port, command))
        wait_for(lambda: progressed(run_dir, 2, back), agents)
        wait_for(lambda: read_status(run_dir).state == "done", agents)
    finally:
        for agent in agents:
            if agent.process.poll() is None:
                agent.process.terminate()
                agent.process.wait()
    alone, elastic = dict(records(tmp_path / "whole")), dict(records(run_dir))
    assert elastic.keys() == alone.keys() == set(range(1, STEPS + 1))
    assert max(abs(elastic[step] - alone[step]) for step in alone) < LOSS
    assert "is for 2 ranks, and there are 1: making a plan" in agents[0].log.read_text()

"""launch.node alone: what it refuses before it starts ranks, and how it reads the end of a run."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from launch import node
from launch.status import CRASHED, DONE, FAILED, STOPPED, StatusFile
from tests.launcher import job
from tests.support import ROOT


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.node", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=job.environment(), timeout=120, **options
    )


CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "configs/none.yaml"], FAILED, "configs/none.yaml is not here, in "),
        (
            ["--nproc", str(CPUS + 1), "train", "configs/retrieval/smoke.yaml", "device=cpu"],
            FAILED,
            f"use --nproc={CPUS}",
        ),
        (["--nproc", "many", "train", "configs/retrieval/smoke.yaml"], FAILED, "--nproc=many: give a number"),
        (["--nnodes", "4:2", "train", "x"], FAILED, "--nnodes=4:2: give N, or MIN:MAX"),
        (["--nnodes", "2", "train", "x"], FAILED, "names no host"),
        (["--nnodes", "2", "--rendezvous", "env:NO_SUCH_HOST", "train", "x"], FAILED, "env:NO_SUCH_HOST names no host"),
        (["smoke"], FAILED, "give `train CONFIG ...` or `evaluate --checkpoint ...`"),
    ],
)
def test_a_mistake_is_one_line_with_the_nodes_name(arguments, code, said):
    done = run(*arguments)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {socket.gethostname()}: ") and said in line


def test_a_wrong_key_is_told_by_gr_itself():
    done = run("train", "configs/retrieval/smoke.yaml", "trainer.stps=3")
    assert done.returncode == FAILED
    assert "did you mean" in done.stderr and "Traceback" not in done.stderr


def test_an_unreachable_rendezvous_says_so():
    """192.0.2.0/24 is for documentation, and routed nowhere."""
    with pytest.raises(
        node.NodeError, match=r"rendezvous 192\.0\.2\.1:29500 does not answer .* on that port\?"
    ) as refused:
        node.await_rendezvous("192.0.2.1:29500", seconds=0)
    assert refused.value.exit_code == CRASHED


def test_the_first_node_waits_for_nobody():
    node.await_rendezvous("localhost:1", seconds=0)


def test_jobs_that_share_a_node_get_ports_of_their_own():
    ports = {node.parse_group("2", "n1", str(job_id)).rendezvous for job_id in range(50)}
    assert len(ports) > 45 and all(int(port.split(":")[1]) in node.PORTS for port in ports)
    assert node.parse_group("2", "n1:29500", "7").rendezvous == "n1:29500"


def test_an_elastic_job_does_not_share_its_store(monkeypatch):
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    elastic, fixed = node.parse_group("2:3", "n1", "7"), node.parse_group("3", "n1", "7")
    assert node.environment(elastic, 1)["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in node.environment(fixed, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert node.environment(fixed, 1)["OMP_NUM_THREADS"] == "3", "the user's own wins"


def test_gpus_count_where_there_are_some(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert node.processes("auto", "auto") == 4
    assert node.processes("auto", "cpu") == 1
    with pytest.raises(node.NodeError, match="this node offers 4 GPUs: use --nproc=4 and more nodes"):
        node.processes("5", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert node.processes("auto", "auto") == 1


@pytest.mark.parametrize(
    ("state", "outcome"), [("done", DONE), ("failed", FAILED), ("stopped", STOPPED), ("running", CRASHED)]
)
def test_outcome_is_what_this_attempt_wrote(tmp_path, state, outcome):
    path = tmp_path / "status.json"
    status = {"state": state, "step": 3, "steps": 9, "error": None, "updated": 1.0}
    path.write_text(json.dumps(status))
    file = StatusFile(path)
    assert file.outcome() == CRASHED, "what an earlier attempt left counts for nothing"
    path.write_text(json.dumps(status | {"updated": 2.0}))
    assert file.outcome() == outcome


def test_no_status_is_a_crash(tmp_path):
    assert StatusFile(tmp_path / "status.json").outcome() == CRASHED


def test_the_agent_hears_one_signal_of_many_and_passes_it_on():
    """What torchrun does with it is its own affair: a shell stands in for it here."""
    counts = "n=0; trap 'n=$((n+1))' USR1; echo ready; for i in $(seq 20); do sleep 0.1; done; exit $n"
    code = f"""
from launch.node import Agent
agent = Agent(["bash", "-c", {counts!r}], {{}}, None)
raise SystemExit(100 + agent.code)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    assert process.wait(30) == 101

"""launch.node alone: what it refuses before it starts ranks, and how it reads the end of a run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import node, rendezvous
from launch.outcome import CRASHED, DONE, FAILED, STOPPED, Attempt, NodeError
from launch.stop import Stop
from tests.launcher import job
from tests.support import ROOT
from tests.support.patience import PATIENCE_SECONDS, until


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.node", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=job.environment() | environment, timeout=PATIENCE_SECONDS
    )


CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
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
        (["--nnodes", "²", "train", "x"], FAILED, "--nnodes=²: give N, or MIN:MAX"),
        (
            ["--nnodes", "2", "--rendezvous", "h:abc", "train", "x"],
            FAILED,
            "--rendezvous=h:abc: give HOST or HOST:PORT",
        ),
        (["--nnodes", "2", "--rendezvous", "h:70000", "train", "x"], FAILED, "1 <= PORT <= 65534"),
        (["--bogus", "3", "train", "x"], FAILED, "no such option: --bogus"),
        (
            ["train", "configs/retrieval/smoke.yaml", "--plan", "x.json"],
            FAILED,
            "--plan: what follows the configuration are values, KEY.PATH=VALUE (planner.plan=plan.json)",
        ),
        (
            ["train", "configs/retrieval/smoke.yaml", "run_dir=/proc/version/run"],
            FAILED,
            "run_dir=/proc/version/run cannot be written: Not a directory",
        ),
        (["smoke"], FAILED, "give `train CONFIG ...` or `evaluate --checkpoint ...`"),
    ],
)
def test_a_mistake_is_one_line_with_the_nodes_name(arguments, code, expected):
    done = run(*arguments)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {socket.gethostname()}: ") and expected in line


def test_a_wrong_key_is_told_by_gr_itself():
    done = run("train", "configs/retrieval/smoke.yaml", "trainer.stps=3")
    assert done.returncode == FAILED
    assert "did you mean" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_refusal_of_gr_is_not_tried_again(tmp_path, python):
    """Nothing is in a status.json, and the code of the ranks says it."""
    done = run("evaluate", "--checkpoint", str(tmp_path / "none"), PYTHON_EXEC=str(python))
    assert done.returncode == FAILED
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1


def test_a_node_without_gpus_says_so():
    done = run("--nproc", "8", "train", "configs/retrieval/smoke.yaml", "device=cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == FAILED
    assert "device=cuda, but no GPU is visible here" in done.stderr


@pytest.mark.slow
def test_ranks_that_find_no_gpu_do_not_train_on_cpu(tmp_path, python):
    pytest.importorskip("torch")
    variables = {"CUDA_VISIBLE_DEVICES": "9", "PYTHON_EXEC": str(python)}
    done = run("train", "configs/retrieval/smoke.yaml", f"run_dir={tmp_path / 'run'}", **variables)
    assert done.returncode == FAILED, done.stderr
    assert "device=cuda" in done.stderr and "Traceback" not in done.stderr


def test_an_unreachable_rendezvous_says_so():
    """192.0.2.0/24 is for documentation, and routed nowhere."""
    with pytest.raises(NodeError, match=r"rendezvous 192\.0\.2\.1:29500 does not answer .* on that port\?") as refused:
        rendezvous.await_rendezvous("192.0.2.1:29500", 0, Stop())
    assert refused.value.exit_code == CRASHED


def test_the_first_node_waits_for_nobody():
    rendezvous.await_rendezvous("localhost:1", 0, Stop())


def test_a_node_that_waits_can_be_stopped():
    code = """
import signal
from launch.rendezvous import await_rendezvous
from launch.stop import Stop
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
with Stop() as stop:
    print("ready", flush=True)
    await_rendezvous("192.0.2.1:29500", 300, stop)
    raise SystemExit(75 if stop.asked else 1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE_SECONDS) == 75


def test_jobs_that_share_a_node_get_ports_of_their_own():
    ports = {rendezvous.parse_group("2", "n1", str(job_id)).rendezvous for job_id in range(50)}
    assert len(ports) > 45 and all(int(port.split(":")[1]) in rendezvous.PORTS for port in ports)
    assert rendezvous.parse_group("2", "n1:29500", "7").rendezvous == "n1:29500"
    assert rendezvous.parse_group("2", "[fe80::1]:29500", "7").rendezvous == "[fe80::1]:29500"


def test_the_first_node_hosts_the_store_under_whatever_name(monkeypatch):
    """A host's own name need not resolve to the address that the others know it by."""
    monkeypatch.setattr(socket, "gethostname", lambda: "another-name.invalid")
    first = rendezvous.Group(2, 2, "127.0.0.5:29500", "7")
    assert first.first_is_here() and first.meeting_place() == ("localhost:29500", "127.0.0.5")
    other = rendezvous.Group(2, 2, "192.0.2.1:29500", "7")
    assert not other.first_is_here() and other.meeting_place() == ("192.0.2.1:29500", None)
    assert first.next_port("8") == rendezvous.Group(2, 2, "127.0.0.5:29501", "8")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_ipv6_alone_is_enough():
    group = rendezvous.parse_group("2", "[::1]:29500", "7")
    assert group.meeting_place() == ("localhost:29500", "::1")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        rendezvous.await_rendezvous(f"[::1]:{port}", 0, Stop())


def test_the_users_own_environment_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ours = node.environment(1)
    assert (ours["OMP_NUM_THREADS"], ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]) == ("3", "1")


def test_gpus_count_where_there_are_some(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert node.visible_gpus() == 4
    assert (node.processes("auto", 4), node.processes("auto", 0)) == (4, 1)
    with pytest.raises(NodeError, match="this node offers 4 GPUs: use --nproc=4 and more nodes"):
        node.processes("5", 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert node.visible_gpus() == 0


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", CPUS), ("50000 100000", 1), (None, CPUS)])
def test_cpus_of_a_container_are_its_quota(tmp_path, quota, expected):
    limit = tmp_path / "cpu.max"
    if quota is not None:
        limit.write_text(f"{quota}\n")
    assert node.cpus(limit) == expected


@pytest.mark.parametrize("content", ["{", "[]", "5", "null", '{"state": []}', '{"state": "failed", "error": "x"}'])
def test_a_status_of_garbage_is_a_crash_or_what_it_says_and_no_traceback(tmp_path, content):
    attempt = Attempt(tmp_path)
    (tmp_path / "status.json").write_text(content)
    assert attempt.outcome() == (FAILED if "failed" in content else CRASHED)
    assert "the run" in attempt.sentence()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/crashes.json").write_text(content)
    assert attempt.crashes("job") == 1


@pytest.mark.parametrize(
    ("state", "outcome"), [("done", DONE), ("failed", FAILED), ("stopped", STOPPED), ("running", CRASHED)]
)
def test_outcome_is_what_this_attempt_wrote(tmp_path, state, outcome):
    path = tmp_path / "status.json"
    status = {"state": state, "step": 3, "steps": 9, "error": None, "updated": 1.0}
    path.write_text(json.dumps(status))
    attempt = Attempt(tmp_path)
    assert attempt.outcome() == CRASHED, "what an earlier attempt left counts for nothing"
    path.write_text(json.dumps(status | {"updated": 2.0}))
    assert attempt.outcome() == outcome


def test_no_status_is_a_crash(tmp_path):
    assert Attempt(tmp_path).outcome() == CRASHED


def test_a_folder_that_does_not_answer_is_no_news(tmp_path, monkeypatch):
    attempt = Attempt(tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda self, errors=None: os.strerror(os.read(-1, 1)))
    assert attempt.outcome() == CRASHED


OPTIONS = {
    "nnodes": "1",
    "nproc": "1",
    "rendezvous": "",
    "job_id": "7",
    "attempt": 0,
    "restarts": 0,
    "crashes": 3,
    "grace": 1,
    "join_timeout": 1,
    "preflight": False,
}


def attempted(run_dir, code, saves=None, state=None, **options) -> int:
    """The outcome of an attempt whose torchrun ends with `code`, after a checkpoint named `saves`."""

    class Agent(node.Node):
        def _run_agent(self, command, attempt):
            if saves:
                (run_dir / "checkpoints" / saves).mkdir(parents=True)
            if state:
                (run_dir / "status.json").write_text(json.dumps({"state": state, "at": time.monotonic()}))
            return code

    group = rendezvous.Group(1, 1, None, "7-0")
    return Agent(node.Options(**(OPTIONS | options)), group, 1, Stop()).train(["x.yaml"], run_dir)


def test_a_job_that_crashes_again_and_again_without_progress_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.outcome.SETTLE_SECONDS", 0)
    assert [attempted(tmp_path, 1), attempted(tmp_path, 1)] == [CRASHED] * 2
    assert attempted(tmp_path, 1, saves="step-00000040") == CRASHED, "a new checkpoint is progress"
    assert attempted(tmp_path, 1) == CRASHED
    with pytest.raises(NodeError, match=r"crashed 3 times in a row without a new checkpoint.*logs$") as given_up:
        attempted(tmp_path, 1)
    assert given_up.value.exit_code == FAILED
    assert attempted(tmp_path, 1, job_id="8") == CRASHED, "another job begins anew"
    assert attempted(tmp_path, 2) == FAILED


def test_ranks_that_torchrun_stopped_after_a_crash_are_no_stop(tmp_path):
    assert attempted(tmp_path, 0, state="stopped") == STOPPED, "a rank of another node was asked to"
    assert attempted(tmp_path, 1, state="stopped") == CRASHED


def test_the_agent_hears_one_signal_of_many_and_passes_it_on():
    """What torchrun does with it is its own affair: a shell stands in for it here."""
    counts = "n=0; trap 'n=$((n+1))' USR1; echo ready; while [ $n = 0 ]; do sleep 0.1; done; sleep 1; exit $n"
    code = f"""
from launch import node
from launch.rendezvous import Group
from launch.stop import Stop
with Stop() as stop:
    share = node.Node(None, Group(1, 1, None, "7"), 1, stop)
    raise SystemExit(100 + share._run_agent(["bash", "-c", {counts!r}], None))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        process.send_signal(number)
    assert process.wait(PATIENCE_SECONDS) == 101


@pytest.mark.slow
def test_ranks_leave_when_launch_node_is_killed(tmp_path):
    pytest.importorskip("torch")
    mark = tmp_path / "pid"
    rank = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getppid())); time.sleep(600)"
    options = ["--nproc-per-node=1", "--signals-to-handle=SIGUSR1"]
    agent = [sys.executable, "-m", "launch.agent", *options, "-m", "timeit", "-n1", "-r1", rank]
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({agent!r})"], cwd=ROOT)
    try:
        until("a rank", lambda: mark.exists() and mark.read_text())
    finally:
        parent.kill()
    torchrun = Path("/proc") / mark.read_text()
    until("the end of torchrun", lambda: not torchrun.exists())

"""launch/components.py as a user of torchx meets it, under every TorchX that is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.patience import PATIENCE_SECONDS

BIN = Path(sys.executable).parent
# `make venv` makes the second one.
TORCHX = {"stable": BIN / "torchx", "nightly": BIN.parent / "torchx-nightly/bin/torchx"}


@pytest.fixture(params=TORCHX)
def torchx(request):
    program = TORCHX[request.param]
    if not program.exists():
        pytest.skip(f"needs {program}: run `make venv`")

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, **variables}
        return subprocess.run(
            [program, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    return run


def request(torchx, *arguments: str, **variables: str) -> str:
    """What the scheduler would be asked to do."""
    done = torchx("run", "--dryrun", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("=== SCHEDULER REQUEST ===\n")[2]


COMPONENTS = {
    "train": (["--config", "c.yaml", "--", "a.b=1"], "launch.node"),
    "evaluate": (["--checkpoint", "runs/a"], "'evaluate', '--checkpoint', 'runs/a'"),
    "plan": (["--config", "c.yaml", "--topology", "h100x64"], "'gr', 'plan', 'c.yaml', '--topology=h100x64'"),
    "prepare": (["--", "synthetic", "--out", "data/x"], "'gr', 'prepare', 'synthetic', '--out', 'data/x'"),
    "smoke": ([], "'gr', 'smoke'"),
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_becomes_a_command(torchx, name):
    arguments, expected = COMPONENTS[name]
    shown = " ".join(request(torchx, "-s", "local_cwd", f"launch/components.py:{name}", *arguments).split())
    assert expected in shown


@pytest.mark.parametrize("name", COMPONENTS)
def test_help_is_the_docstring(torchx, name):
    done = torchx("run", f"launch/components.py:{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert "what it runs on" in done.stdout or "what a node offers" in " ".join(done.stdout.split()) or name == "plan"


def test_slurm_request_names_the_first_node_and_the_hardware(torchx):
    component = ["launch/components.py:train", "--config", "c.yaml", "--nnodes", "2", "--resource", "h100x8"]
    script = request(torchx, "-s", "slurm", *component, "--", "task.negatives={kind: full}")
    assert script.count("--cpus-per-task=176 --mem=1840000 --gpus-per-task=8") == 2
    command = "launch.node --nnodes=2 --nproc=8 --rendezvous=env:SLURM_JOB_NODELIST_HET_GROUP_0"
    assert script.count(command) == 2
    assert "'task.negatives={kind: full}'" in script, "quoted once for the shell"


def test_kubernetes_request_needs_no_cluster(torchx):
    component = ["launch/components.py:train", "--config", "c.yaml", "--nnodes", "2", "--resource", "h100x8"]
    manifest = yaml.safe_load(request(torchx, "-s", "kubernetes", *component, "--image", "registry/gr:1"))
    tasks = [task["template"]["spec"]["containers"][0] for task in manifest["spec"]["tasks"]]
    assert [task["resources"]["limits"]["nvidia.com/gpu"] for task in tasks] == ["8", "8"]
    first, second = ([each for each in task["command"] if "rendezvous" in each] for task in tasks)
    assert (first, second) == (["--rendezvous=env:TORCHX_RANK0_HOST"], ["--rendezvous=env:VC_TRAIN_0_HOSTS"])
    assert {"name": "TORCHX_RANK0_HOST", "value": "localhost"} in tasks[0]["env"]


def test_a_host_of_other_shape_and_devices(torchx):
    component = ["launch/components.py:train", "--config", "c.yaml"]
    own = "a100x8,cpu=64,memory=500,rdma/ib=4"
    script = request(torchx, "-s", "slurm", *component, "--resource", own)
    assert "--cpus-per-task=64 --mem=500000 --gpus-per-task=8" in script
    manifest = yaml.safe_load(request(torchx, "-s", "kubernetes", *component, "--resource", own))
    limits = manifest["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "64000m", "memory": "500000M", "nvidia.com/gpu": "8", "rdma/ib": "4"}


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_gpu_hosts_train_on_gpus_or_not_at_all(torchx, name):
    asked = {"train": ["--config", "c.yaml"], "evaluate": ["--checkpoint", "runs/a"]}[name]
    component = ["-s", "slurm", f"launch/components.py:{name}", *asked]
    assert "device=" not in request(torchx, *component, "--", "a.b=1")
    script = request(torchx, *component, "--resource", "h100x8", "--", "device=cpu")
    assert script.index("device=cuda") < script.index("device=cpu"), "the later one wins in gr, and it is the user's"


def test_agents_on_one_machine_share_its_gpus_out(torchx, tmp_path):
    """As docs/launch.md says; without it each would take them all."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    local = ["-s", "local_cwd", "-cfg", "auto_set_cuda_visible_devices=true", "launch/components.py:train"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    shown = request(torchx, *local, "--config", "c.yaml", "--nnodes", "2", "--resource", "h100x2", PATH=path)
    assert "'CUDA_VISIBLE_DEVICES': '0,1'" in shown and "'CUDA_VISIBLE_DEVICES': '2,3'" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--resource", "v100x8"],
            "--resource=v100x8 is not known: give NAME or NAMExCOUNT with NAME one of cpu, a100",
        ),
        (["--resource", "h100x16"], "a host has 8 GPUs; use h100x8 and more nodes"),
        (
            ["--resource", "h100x4", "--nproc", "8"],
            "--resource=h100x4 offers 4 GPUs a node: use --nproc=4 and more nodes",
        ),
        (["--resource", "cpux2", "--nproc", "3"], "--resource=cpux2 offers 2 CPUs a node"),
        (["--nproc=-1"], "--nproc=-1 ranks"),
        (["--nnodes", "3:2"], "--nnodes=3:2: give N, or MIN:MAX"),
        (["--nnodes", "0"], "--nnodes=0: give N"),
        (["--resource", "h100x8,cpus=9"], "cpus=9: after the name go cpu=COUNT, memory=GB and VENDOR/DEVICE=COUNT"),
        (["--resource", "h100x8,cpu=9,cpu=8"], "cpu=8: after the name go cpu=COUNT"),
        (["--retries=-1"], "--retries=-1: give 0 or more"),
        (["--mounts", "nonsense"], "--mounts=nonsense: give type=bind,src=/data,dst=/data (unknown mount option"),
        (["--mounts", "type=bind,src=/a"], "--mounts=type=bind,src=/a: give type=bind,src=/data,dst=/data (dst)"),
        (["--mounts", "type=tape,src=/a"], "(invalid mount type 'tape'"),
    ],
)
def test_a_mistake_is_one_line(torchx, arguments, expected):
    done = torchx("run", "-s", "local_cwd", "launch/components.py:train", "--config", "c.yaml", *arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert line.startswith("error: ") and expected in line

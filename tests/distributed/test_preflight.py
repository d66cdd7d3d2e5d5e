"""The checks of `gr doctor --cluster` on real ranks that play hosts, one of them with a fault."""

import importlib.metadata
import os
import socket
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from gr.cluster import preflight as checks
from gr.cluster.links import LinkRates, slow_hosts
from gr.cluster.preflight import Finding, preflight
from gr.config.run import PlannerConfig
from gr.dist import World
from gr.errors import InstallError
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config

HOSTS = ["h1", "h2", "h3"]


def one_rank_a_host(world: World) -> World:
    return World(world.rank, world.size, 0, 1, world.device)


def whole(world: World, run_dir: Path) -> list[Finding]:
    socket.gethostname = lambda: HOSTS[world.rank]
    return list(preflight(tiny_config(run_dir / "data", run_dir), one_rank_a_host(world), ""))


def test_a_sound_cluster(tmp_path: Path) -> None:
    for found in run_ranks(whole, 3, tmp_path / "run"):
        assert [(finding.check, finding.faults) for finding in found] == [
            (check, ()) for check in ("rendezvous", "versions", "devices", "operators", "clocks", "run folder", "links")
        ]
        assert found[0].summary == "3 ranks on 3 host(s): h1, h2, h3"
        assert "cpu assumes 0.24" in found[-1].summary
    assert list((tmp_path / "run").iterdir()) == [], "it leaves nothing behind"


def other_versions(world: World) -> tuple[str, ...]:
    real = importlib.metadata.version
    if world.rank == 1:
        importlib.metadata.version = lambda name: "2.12.1" if name == "torch" else real(name)
    return checks.versions(world, HOSTS, "torch and fbgemm do not pair: pip install" if world.rank == 2 else "").faults


def test_another_version_on_one_host() -> None:
    installed = importlib.metadata.version("torch")
    for faults in run_ranks(other_versions, 3):
        assert faults == (
            "h3: torch and fbgemm do not pair: pip install",
            f"h2: torch is 2.12.1, and {installed} elsewhere: install the same versions on all hosts",
        )


def no_gpu_on_the_second(world: World) -> list[tuple[str, ...]]:
    torch.cuda.device_count = lambda: 0 if world.rank == 1 else 1
    torch.cuda.get_device_name = lambda _: "NVIDIA H200"
    here = one_rank_a_host(world)
    return [checks.devices(here, HOSTS, "auto").faults, checks.devices(here, HOSTS, "cpu").faults]


def test_a_host_without_its_gpu() -> None:
    for missed, unused in run_ranks(no_gpu_on_the_second, 3):
        assert len(missed) == 1 and missed[0].startswith("h2: torch sees 0 GPU(s) for 1 rank(s): look at nvidia-smi")
        assert unused == ()


def other_operators(world: World, run_dir: Path) -> list[Finding]:
    config, found = tiny_config(run_dir / "data", run_dir), []
    for odd in (InstallError("triton does not start"), "torch"):
        checks.backend_for = Mock(side_effect=[odd if world.rank == 1 else "native"])
        found.append(checks.operators(world, HOSTS, config))
    return found


def test_operators_that_do_not_run_on_one_host(tmp_path: Path) -> None:
    for refused, slower in run_ranks(other_operators, 3, tmp_path):
        assert refused.faults == ("h2: triton does not start",)
        assert (slower.faults, slower.summary) == ((), "native, torch on h2")


def cpu_build_on_gpu_hosts(world: World) -> list[tuple[str, ...]]:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    here = one_rank_a_host(world)
    return [checks.devices(here, HOSTS, "auto").faults, checks.devices(here, HOSTS, "cpu").faults]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPUs of this machine")
def test_gpus_that_no_host_can_use() -> None:
    """Else a whole job on GPU machines would train on their CPUs."""
    for missed, unused in run_ranks(cpu_build_on_gpu_hosts, 3):
        assert [fault.partition(":")[0] for fault in missed] == HOSTS
        assert missed[0].startswith("h1: offers 2 GPU(s), and its torch can use none: install the CUDA build")
        assert unused == ()


def one_clock_off(world: World, seconds: float) -> tuple[str, ...]:
    return checks.clocks(world, HOSTS, lambda: time.time() + (seconds if world.rank == 2 else 0)).faults


@pytest.mark.parametrize(("seconds", "words"), [(-60, "60.0 s behind"), (7, "7.0 s ahead")])
def test_a_clock_that_is_off(seconds: float, words: str) -> None:
    for faults in run_ranks(one_clock_off, 3, seconds):
        assert len(faults) == 1 and faults[0].startswith(f"h3: its clock is {words}")
    assert run_ranks(one_clock_off, 3, 1.0) == [()] * 3


def folders(world: World, paths: list[Path]) -> tuple[str, ...]:
    return checks.run_folder_is_shared(world, HOSTS[: world.size], paths[world.rank]).faults


def test_a_run_folder_that_is_not_shared(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    other.mkdir()
    for faults in run_ranks(folders, 3, [shared, other, tmp_path / "none"]):
        assert len(faults) == 2
        assert faults[0] == f"h2: run_dir={other} is another folder there than on h1: mount the shared one"
        assert faults[1].startswith(f"h3: run_dir={tmp_path}/none is not there, and it is on h1: mount")
    (tmp_path / "file").write_text("")
    for faults in run_ranks(folders, 2, [tmp_path / "file/run", shared]):
        assert faults == (f"h1: run_dir={tmp_path}/file/run cannot be written: Not a directory; set another one",)
    assert list(shared.iterdir()) == []


def slower_than_planned(world: World, topology: str) -> Finding:
    config = tiny_config(Path("data"), Path("run"))
    config = config.model_copy(update={"planner": PlannerConfig(topology=topology)})
    return checks.links(one_rank_a_host(world), HOSTS, config)


def test_links_that_are_slower_than_the_plan_counts_on(tmp_path: Path) -> None:
    """Loopback against a network of a terabyte a second: all three are to blame."""
    path = tmp_path / "fast.yaml"
    path.write_text("hardware: cpu\ninter_bandwidth: 1 TB/s\n")
    found = run_ranks(slower_than_planned, 3, str(path))[0]
    assert [fault.partition(":")[0] for fault in found.faults] == HOSTS
    assert "less than half of 1e+03: look at its links, or plan with a topology that `gr calibrate`" in found.faults[0]


def test_the_slow_host_of_four_is_named() -> None:
    rates = {(0, 1): 9.0, (1, 2): 2.0, (2, 3): 3.0, (3, 0): 8.0}
    assert slow_hosts(LinkRates(2.0, 2.0, rates), bandwidth=5.0, hosts=4) == [2]
    assert slow_hosts(LinkRates(2.0, 2.0, {(0, 1): 2.0}), bandwidth=5.0, hosts=2) == [0, 1], "nothing tells them apart"


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path, python: Path) -> None:
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "gr"]
    config = "configs/retrieval/smoke.yaml"
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": str(python)}
    command = [*torchrun, "doctor", "--cluster", config]
    good = subprocess.run(
        [*command, f"run_dir={tmp_path}/run"], capture_output=True, text=True, cwd=root, env=environment
    )
    assert good.returncode == 0, good.stderr
    assert [line.split()[0] for line in good.stdout.splitlines()] == ["ok"] * 7
    (tmp_path / "file").write_text("")
    bad = subprocess.run(
        [*command, f"run_dir={tmp_path}/file/run"], capture_output=True, text=True, cwd=root, env=environment
    )
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[-1].startswith("FAULT  run folder  ") and "Traceback" not in bad.stdout

"""`gr doctor`: the verdict on every way an installation goes wrong, on made-up machines."""

import subprocess
import sys
from dataclasses import replace

import pytest

from gr.cli import doctor, main
from gr.cli.doctor import Installed, describe, diagnose

CPU = Installed(
    versions={
        "torch": "2.13.0+cpu",
        "torchrec": "1.8.0",
        "fbgemm-gpu": "1.8.0+cpu",
        "fbgemm-gpu-cpu": "1.8.0",
        "torchmetrics": "1.0.3",
    }
)
CUDA = Installed(
    versions={"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "torchmetrics": "1.0.3"},
    cuda="13.0",
    gpus=("NVIDIA H200",),
    driver=True,
)


def having(machine: Installed, **versions: str | None) -> Installed:
    changed = {**machine.versions, **{name.replace("_", "-"): version for name, version in versions.items()}}
    return replace(machine, versions={name: version for name, version in changed.items() if version})


@pytest.mark.parametrize(
    "machine",
    [
        CPU,
        CUDA,
        having(CPU, fbgemm_gpu=None),
        having(CPU, torch="2.13.4"),
        replace(CPU, driver=True),
        replace(CUDA, gpus=(), driver=False),
    ],
)
def test_good(machine):
    assert diagnose(machine) == []


@pytest.mark.parametrize(
    ("machine", "problem", "remedy"),
    [
        (having(CPU, torch=None), "torch 2.13.* is needed and not installed", "constraints/cpu.txt"),
        (having(CPU, torch="2.14.0+cpu"), "torch 2.14.0+cpu is installed, 2.13.* is needed", "constraints/cpu.txt"),
        (having(CPU, torchrec="1.9.2"), "torchrec 1.9.2 is installed, 1.8.0 is needed", "constraints/cpu.txt"),
        (having(CPU, torchmetrics="1.9.0"), "torchmetrics 1.9.0 is installed, 1.0.3", "constraints/cpu.txt"),
        (having(CPU, fbgemm_gpu_cpu="1.9.0"), "fbgemm 1.9.0 is installed, 1.8.0", "constraints/cpu.txt"),
        (having(CUDA, fbgemm_gpu="1.9.0"), "fbgemm 1.9.0 is installed, 1.8.0", "constraints/cuda.txt"),
        (having(CPU, fbgemm_gpu=None, fbgemm_gpu_cpu=None), "fbgemm-gpu-cpu or fbgemm-gpu 1.8.0", "cpu.txt"),
        (having(CPU, fbgemm_gpu_cpu=None), "fbgemm-gpu-cpu or fbgemm-gpu 1.8.0 is needed", "constraints/cpu.txt"),
        (having(CPU, fbgemm_gpu="1.8.0"), "both installed", "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && "),
        (
            replace(CPU, versions={**CUDA.versions, "torch": "2.13.0+cpu"}),
            "fbgemm-gpu is the CUDA build, torch is the CPU build",
            "constraints/cpu.txt",
        ),
        (
            replace(CUDA, versions=having(CPU, torch="2.13.0").versions),
            "there is a GPU (NVIDIA H200), but fbgemm is the CPU build",
            "constraints/cuda.txt",
        ),
        (replace(CPU, errors={"torch": "OSError: x"}), "torch does not import: OSError: x", "constraints/cpu.txt"),
    ],
)
def test_faults(machine, problem, remedy):
    faults = diagnose(machine)
    assert len(faults) == 1
    assert problem in faults[0].problem
    assert remedy in faults[0].remedy


def test_command_on_a_bad_machine(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "inspect_machine", lambda: having(CPU, torchrec="1.9.2"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fault: torchrec 1.9.2 is installed, 1.8.0 is needed\n  remedy: pip install" in out
    assert out.endswith("1 fault(s)\n")


@pytest.mark.slow
def test_command_on_this_machine(capsys):
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert out.startswith("python ")
    assert (code == 0) == ("ok: the packages fit together" in out)


def _with_python(monkeypatch, tmp_path, body):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_import_that_ends_the_process(monkeypatch, tmp_path):
    _with_python(monkeypatch, tmp_path, "echo 'undefined symbol: x' >&2; exit 139")
    assert doctor.inspect_machine().errors == {
        "torch": "importing ended the process with code 139: undefined symbol: x"
    }


def test_import_that_hangs(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    _with_python(monkeypatch, tmp_path, "exec sleep 60")
    assert "took more than 0.2 s" in doctor.inspect_machine().errors["torch"]


def test_without_torch():
    """In an interpreter that finds no third-party module the probe still answers."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", doctor._PROBE], capture_output=True, text=True, check=True)
    assert '"torch": "ModuleNotFoundError: No module named' in done.stdout


def test_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert any(line.startswith("C++ compiler") and "slower pure-torch paths" in line for line in describe(CPU))
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    assert any(line.endswith(f"{tmp_path}/clang++") for line in describe(CPU))


def test_devices():
    assert any("NVIDIA H200" in line for line in describe(CUDA))
    assert any(line.endswith("none (CPU build of torch)") for line in describe(CPU))
    assert any("torch does not import" in line for line in describe(replace(CPU, errors={"torch": "x"})))

"""`gr doctor`: do the installed packages fit together, and the remedy when not. Works where torch does not import."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

import click

from gr.cli.out import say
from gr.config import load_config
from gr.environment import whole_number
from gr.errors import ConfigError, GRError

# The one set that loads together: fbgemm's binaries are built against one minor version of torch.
WANTED = {"torch": "2.13.*", "torchrec": "1.8.0", "fbgemm": "1.8.0", "torchmetrics": "1.0.3"}
SHOWN = (
    *("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchmetrics", "tensordict", "triton"),
    *("pyarrow", "numpy", "scipy", "pydantic", "torchx"),
)
INSTALL = {
    "cpu": 'pip install -c constraints/cpu.txt ./packaging/fbgemm-gpu-cpu -e ".[cpu]"',
    "cuda": 'pip install -c constraints/cuda.txt -e ".[cuda]"',
}
_TIMEOUT_S = 300  # a cold first import of torch from a network disk takes minutes

# Runs in a process of its own: a library that does not fit may end the process instead of raising.
_PROBE = """
import importlib, json
found = {"errors": {}, "devices": []}
for name in ("torch", "fbgemm_gpu", "torchrec", "torchmetrics"):
    try:
        importlib.import_module(name)
    except BaseException as error:
        found["errors"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
if "torch" not in found["errors"]:
    import torch
    found["cuda"] = torch.version.cuda
    count = torch.cuda.device_count() if torch.version.cuda else 0
    found["devices"] = [torch.cuda.get_device_name(i) for i in range(count)]
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True)
class Installed:
    """The packages and devices of this machine.

    versions: distribution -> version. errors: module -> why it does not import.
    cuda: CUDA version of the torch build, None for a CPU build. gpus: names of the devices torch sees.
    driver: an NVIDIA driver is present, whatever torch sees.
    """

    versions: Mapping[str, str]
    errors: Mapping[str, str] = field(default_factory=dict)
    cuda: str | None = None
    gpus: tuple[str, ...] = ()
    driver: bool = False


@dataclass(frozen=True)
class Fault:
    problem: str
    remedy: str


@click.command(
    help="Check that the installed packages fit together; exit code 1 and a remedy when they do not. With --cluster, "
    "under torchrun: check all hosts for the run of CONFIG, name the one that is at fault."
)
@click.option("--cluster", is_flag=True, help="Versions, devices, clocks, run folder and links of all ranks.")
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def command(cluster: bool, config: str | None, overrides: tuple[str, ...]) -> int:
    if cluster:
        return _check_cluster(config, overrides)
    if config is not None:
        raise ConfigError(f"{config}: a configuration is for the checks of all hosts: add --cluster")
    installed = inspect_machine()
    for line in describe(installed):
        say(line)
    faults = diagnose(installed)
    for fault in faults:
        say("", f"fault: {fault.problem}", f"  remedy: {fault.remedy}")
    say("", f"{len(faults)} fault(s)" if faults else "ok: the packages fit together")
    return 1 if faults else 0


def _check_cluster(config: str | None, overrides: tuple[str, ...]) -> int:
    """One line a check, from rank 0; exit code 1 on every rank when a check finds a fault."""
    loaded = load_config(config, overrides) if config is not None else None
    import torch

    from gr import logging
    from gr.cluster.preflight import preflight
    from gr.dist import world

    logging.configure(whole_number("RANK", 0))
    # Without the probe: what this process could not import, it would have said already.
    misfits = diagnose(Installed(_versions(), cuda=torch.version.cuda))
    pairing = "; ".join(f"{fault.problem}: {fault.remedy}" for fault in misfits)
    faults = 0
    try:
        with world("cpu", timeout=_TIMEOUT_S) as here:
            for finding in preflight(loaded, here, pairing):
                faults += len(finding.faults)
                if here.is_main:
                    for fault in finding.faults:
                        say(f"FAULT  {finding.check:<11} {fault}")
                    if not finding.faults:
                        say(f"ok     {finding.check:<11} {finding.summary}")
    except GRError as error:  # a rank that cannot join has only its own voice
        say(f"FAULT  {'rendezvous':<11} {error}")
        return 1
    return 1 if faults else 0


def _versions() -> dict[str, str]:
    versions = {}
    for name in SHOWN:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def inspect_machine() -> Installed:
    probe = _probe_imports()
    return Installed(
        versions=_versions(),
        errors=probe.get("errors", {}),
        cuda=probe.get("cuda"),
        gpus=tuple(probe.get("devices", ())),
        driver=shutil.which("nvidia-smi") is not None,
    )


def _probe_imports() -> dict:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"errors": {"torch": f"importing took more than {_TIMEOUT_S} s"}}
    except (IndexError, ValueError):  # died before it could speak
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"errors": {"torch": f"importing ended the process with code {done.returncode}: {last}"}}


def describe(installed: Installed) -> list[str]:
    """The versions, devices and compiler, one a line."""
    rows = [("python", platform.python_version())]
    rows += [(name, installed.versions.get(name, "-")) for name in SHOWN]
    rows.append(("CPU", f"{os.cpu_count()} cores"))
    build = f"CUDA {installed.cuda} build" if installed.cuda else "CPU build"
    none = "unknown: torch does not import" if "torch" in installed.errors else f"none ({build} of torch)"
    rows.append(("GPU", ", ".join(installed.gpus) or none))
    compiler = _compiler()
    rows.append(("C++ compiler", compiler or "none: the native CPU ops are off, slower pure-torch paths are used"))
    return [f"{name:<16}{value}" for name, value in rows]


def _compiler() -> str | None:
    named = [os.environ["CXX"]] if os.environ.get("CXX") else []
    return next((path for name in (*named, "g++", "c++", "clang++") if (path := shutil.which(name))), None)


def diagnose(installed: Installed) -> list[Fault]:
    """The faults, each with the command that mends it. The first one usually explains the later ones."""
    install = INSTALL["cuda" if installed.cuda or installed.driver else "cpu"]
    faults = _version_faults(installed, install) or _pairing_faults(installed)
    if not faults:
        faults = [Fault(f"{name} does not import: {why}", install) for name, why in installed.errors.items()]
    return faults


def _version_faults(installed: Installed, install: str) -> list[Fault]:
    faults = []
    for name, expected in WANTED.items():
        version = _fbgemm_version(installed) if name == "fbgemm" else installed.versions.get(name)
        if version is None:
            package = "fbgemm-gpu-cpu or fbgemm-gpu" if name == "fbgemm" else name
            faults.append(Fault(f"{package} {expected} is needed and not installed", install))
        elif not fnmatch(version.partition("+")[0], expected):
            faults.append(Fault(f"{name} {version} is installed, {expected} is needed", install))
    return faults


def _pairing_faults(installed: Installed) -> list[Fault]:
    """The right versions in combinations that cannot work."""
    cpu, cuda = "fbgemm-gpu-cpu" in installed.versions, _has_cuda_fbgemm(installed)
    # Uninstalling either removes the folder they share, so both go and one comes back.
    swap = f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {INSTALL['cuda' if installed.cuda else 'cpu']}"
    if cpu and cuda:
        return [Fault("fbgemm-gpu and fbgemm-gpu-cpu are both installed, and write into the same folder", swap)]
    if cuda and not installed.cuda and "torch" not in installed.errors:
        return [Fault("fbgemm-gpu is the CUDA build, torch is the CPU build", swap)]
    if cpu and installed.gpus:
        return [Fault(f"there is a GPU ({installed.gpus[0]}), but fbgemm is the CPU build", swap)]
    return []


def _has_cuda_fbgemm(installed: Installed) -> bool:
    """fbgemm-gpu X+cpu is this repository's empty stand-in for the CPU build, not the CUDA build."""
    return not installed.versions.get("fbgemm-gpu", "+cpu").endswith("+cpu")


def _fbgemm_version(installed: Installed) -> str | None:
    return installed.versions["fbgemm-gpu"] if _has_cuda_fbgemm(installed) else installed.versions.get("fbgemm-gpu-cpu")

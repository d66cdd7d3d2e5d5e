"""The conditions of compiled code beside the model: versions of packages and the instruction set of the CPU."""

import platform
import re
from pathlib import Path

import fbgemm_gpu
import torch

from gr import __version__
from gr.errors import ServingError
from gr.serving.package.layout import CPU, Manifest

# Of the flags in /proc/cpuinfo, those of instructions that compilers emit with -march=native.
_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|bmi|f16c|popcnt|abm|movbe|adx|aes|vaes|v?pclmul|gfni|sha_ni|cx16|lahf|asimd|sve|fp$|fphp)"
)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "fbgemm_gpu": fbgemm_gpu.__version__, "gr": __version__}


def cpu() -> CPU:
    """The instruction set of this machine."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return CPU(machine=platform.machine(), features=tuple(sorted(flag for flag in flags if _INSTRUCTIONS.match(flag))))


def require_this_machine(place: Path, manifest: Manifest) -> None:
    """Raises ServingError where a package was made for another torch, fbgemm_gpu or CPU. gr may differ."""
    mine, remedy = versions(), "export the checkpoint on this machine"
    for name in ("torch", "fbgemm_gpu"):
        if manifest.versions.get(name) != mine[name]:
            raise ServingError(
                f"{place}: was made for {name} {manifest.versions.get(name)}, here is {mine[name]}; install that, or "
                f"{remedy}"
            )
    there, here = manifest.cpu, cpu()
    if there.machine != here.machine:
        raise ServingError(f"{place}: was made for a CPU of {there.machine}, this one is {here.machine}; {remedy}")
    if lacking := [name for name in there.features if name not in here.features]:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ServingError(
            f"{place}: was made for a CPU with {', '.join(lacking[:3])}{more}, which this has not; {remedy}"
        )

"""What this machine reaches on the simplest work, against which everything else is a fraction."""

import ctypes
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import torch

from benchmarks.compare import compare, cpu_model

_PACKAGES = ("torch", "triton", "torchrec", "numpy")


@dataclass(frozen=True)
class Peaks:
    """Measured: square matrix products in FLOP/s, and a copy in bytes read and written a second."""

    float32: float
    bfloat16: float
    copy: float

    def of(self, variant: str) -> float:
        return self.bfloat16 if "bfloat16" in variant else self.float32


@cache
def peaks(device: str) -> Peaks:
    """Of one thread on CPU, of the whole device otherwise. Random data: zeros would draw less power."""
    n = 1024 if device == "cpu" else 8192
    size = 1 << (26 if device == "cpu" else 30)
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    low_a, low_b = a.bfloat16(), b.bfloat16()
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timings = compare(
        {"float32": lambda: a @ b, "bfloat16": lambda: low_a @ low_b, "copy": lambda: target.copy_(source)},
        rounds=9,
        device=device,
    )
    # The best quartile: a shared machine only ever slows a product down.
    return Peaks(2 * n**3 / timings["float32"].low, 2 * n**3 / timings["bfloat16"].low, 2 * size / timings["copy"].low)


def describe(device: str) -> str:
    """One line: the date, the machine, the versions."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cpu":
        where = f"one thread of {cpu_model()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    else:
        where = torch.cuda.get_device_name()
    return f"{date.today()}, {where}; python {platform.python_version()}, {', '.join(versions)}"


def peak_kib() -> int:
    """The most memory this process has held, since reset_peak()."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def reset_peak() -> None:
    """Starts the high-water mark anew (proc(5), clear_refs), with what earlier work has freed given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

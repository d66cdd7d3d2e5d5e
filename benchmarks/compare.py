"""Ratios that hold on a busy machine: variants take turns, CPU time is counted instead of wall time, medians are kept.

Only use it with one thread: CPU time adds up over threads. On a GPU it is the device's time between two events.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Variant = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the quartiles over the rounds."""

    median: float
    low: float
    high: float


def compare(
    variants: Mapping[str, Variant],
    *,
    rounds: int = 7,
    round_seconds: float = 0.15,
    warmups: int = 2,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Timing]:
    """Time the variants round-robin. Each takes about `round_seconds`, at least one call, a round.

    progress: told what begins, as long runs are silent otherwise.
    """
    if device == "cpu" and torch.get_num_threads() != 1:
        raise RuntimeError(f"compare counts CPU time: call torch.set_num_threads(1), not {torch.get_num_threads()}")
    seconds = _cpu_seconds if device == "cpu" else _gpu_seconds
    calls = {}
    for name, variant in variants.items():
        progress(f"warming up {name}")
        for _ in range(warmups - 1):
            variant()
        calls[name] = max(1, int(round_seconds / max(seconds(variant, 1), 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        for name, variant in variants.items():
            samples[name].append(seconds(variant, calls[name]))
    return {name: _summary(times) for name, times in samples.items()}


def report(title: str, timings: Mapping[str, Timing], *, baseline: str) -> None:
    """Print milliseconds and how many times faster than the baseline each variant is."""
    base = timings[baseline].median
    print(f"\n{title}")
    for name, timing in timings.items():
        spread = f"[{timing.low * 1e3:.1f}, {timing.high * 1e3:.1f}]"
        print(f"  {name:34s} {timing.median * 1e3:9.1f} ms {spread:>18s}  {base / timing.median:6.2f}x")


def print_machine() -> None:
    """The line without which a number means nothing."""
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread")
    print(f"{cpu_model()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {' '.join(sys.argv)}")


def _cpu_seconds(variant: Variant, calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        variant()
    return (time.process_time() - started) / calls


def _gpu_seconds(variant: Variant, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        variant()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _summary(times: list[float]) -> Timing:
    if len(times) < 2:
        return Timing(times[0], times[0], times[0])
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high)


def cpu_model() -> str:
    """The model, the family numbers too, since virtual machines often hide the name, and its instruction sets.

    The last is the one in use, by torch and by gr's C++ operators: ATEN_CPU_CAPABILITY can lower it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict.fromkeys(("model name", "cpu family", "model", "stepping", "flags", "Features"), "?")
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if fields.get(key.strip()) == "?":
            fields[key.strip()] = value.strip()
    sets = instruction_sets({*fields["flags"].split(), *fields["Features"].split()})
    sets += f"; instruction set {torch.backends.cpu.get_cpu_capability()}"
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']}; {sets})"


def instruction_sets(flags: set[str]) -> str:
    """The widest vectors, and whether there are products of bf16 and of tiles, by the flags of /proc/cpuinfo."""
    widths = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON", "sse2": "SSE2"}
    widest = next((name for flag, name in widths.items() if flag in flags), "no vectors")
    bf16 = "bf16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "no bf16"
    return ", ".join([widest, bf16, "AMX" if "amx_tile" in flags else "no AMX"])

"""Measures the figures of a Topology: row lookups, matrix products, all-to-all, all-reduce; CPU or CUDA, any ranks.

All ranks work at the same time, as in training, so that the figures of ranks that share a memory or link show it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from os import sysconf
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from gr.dist import World
from gr.errors import PlanError
from gr.logging import get_logger
from gr.planner.topology import Topology

_log = get_logger(__name__)
Work = Callable[[int], object]  # what is timed, by the number of the turn
Collective = Callable[[ProcessGroup, torch.device, int], tuple[Work, float]]
ROW_DIM = 128  # fp32: 512 bytes a row
FIGURES = tuple(field.name for field in fields(Topology)[4:])  # after name, device, ranks and ranks_per_host


@dataclass(frozen=True)
class Load:
    """The size of the measurements. The table is larger than caches, and every repeat reads other rows of it."""

    table_rows: int
    lookups: int
    gemm_size: int
    message_bytes: tuple[int, ...]  # each rank's, at least two sizes
    repeats: int


CPU_LOAD = Load(1 << 20, 1 << 17, 1024, (1 << 12, 1 << 24), repeats=25)
CUDA_LOAD = Load(1 << 23, 1 << 20, 8192, (1 << 14, 1 << 28), repeats=20)


@dataclass(frozen=True)
class Link:
    """A collective that sends `bytes` from each rank takes latency + bytes / bandwidth seconds."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Measurement:
    """Means over ranks in bytes/s, FLOP/s and seconds. A link is None where no two ranks have it between them."""

    lookup_bandwidth: float
    flops_bf16: float
    flops_fp32: float
    intra_all_to_all: Link | None = None
    intra_all_reduce: Link | None = None
    inter_all_to_all: Link | None = None
    inter_all_reduce: Link | None = None


def measure(world: World, load: Load) -> Measurement:
    """Measures this machine; every rank must call it. Raises PlanError for noisy times or hosts of unequal size."""
    intra, inter = _groups(world)
    lookup = lookup_bandwidth(world.device, load)
    bf16, fp32 = (gemm_flops(world.device, dtype, load) for dtype in (torch.bfloat16, torch.float32))
    links = {}
    for where, group in (("intra", intra), ("inter", inter)):
        for name, collective in (("all_to_all", all_to_all), ("all_reduce", all_reduce)):
            if group is not None:
                _log.info("measuring %s_%s", where, name)
                links[f"{where}_{name}"] = fit_link(*_times(collective, group, world, load))
    lookup, bf16, fp32 = _mean(world, [lookup, bf16, fp32])
    return Measurement(lookup, bf16, fp32, **links)


def lookup_bandwidth(device: torch.device, load: Load) -> float:
    """Bytes/s of reading random rows and writing them out: 2 x 512 bytes a row."""
    _log.info("measuring row lookups")
    # The table is written, not only allocated: the system backs untouched memory by one page of zeros.
    table = torch.ones(load.table_rows, ROW_DIM, device=device)
    out = torch.empty(load.lookups, ROW_DIM, device=device)
    ids = torch.randint(load.table_rows, (load.repeats + 1, load.lookups), device=device)
    seconds = median_seconds(lambda turn: torch.index_select(table, 0, ids[turn], out=out), device, load.repeats)
    return 2 * out.nbytes / seconds


def gemm_flops(device: torch.device, dtype: torch.dtype, load: Load) -> float:
    """FLOP/s of a square matrix product, a multiplication and an addition counted as two."""
    _log.info("measuring %s matrix products", str(dtype).removeprefix("torch."))
    size = load.gemm_size
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / median_seconds(lambda _: torch.mm(left, right, out=out), device, load.repeats)


def fit_link(sent: list[float], seconds: list[float]) -> Link:
    """Least squares of seconds = latency + sent / bandwidth. Raises PlanError when no link behaves like that."""
    slope, latency = np.polyfit(sent, seconds, 1)
    # Noise would be read as bandwidth if the largest message took hardly longer than the smallest.
    if latency <= 0 or seconds[-1] < 2 * seconds[0]:
        shown = ", ".join(f"{size:.0f} bytes in {time * 1e6:.0f} us" for size, time in zip(sent, seconds, strict=True))
        raise PlanError(f"the link's times fit no latency and bandwidth ({shown}): run again on a quiet machine")
    return Link(float(latency), float(1 / slope))


def machine_figures(measured: Measurement, world: World) -> dict[str, Any]:
    """The fields of Topology that are known of this machine. Links are those of all-to-all, which tables use."""
    memory = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE") // world.local_size
    figures: dict[str, Any] = {
        "hbm_bytes": memory,
        "hbm_bandwidth": measured.lookup_bandwidth,
        "flops_bf16": measured.flops_bf16,
        "flops_fp32": measured.flops_fp32,
    }
    if world.device.type == "cuda":
        figures |= {"hbm_bytes": torch.cuda.get_device_properties(world.device).total_memory, "host_bytes": memory}
    else:
        figures["host_bandwidth"] = measured.lookup_bandwidth  # one memory
        figures |= {"peak_bf16": measured.flops_bf16, "peak_fp32": measured.flops_fp32}  # none is published
    for where, link in (("intra", measured.intra_all_to_all), ("inter", measured.inter_all_to_all)):
        if link is not None:
            figures |= {f"{where}_bandwidth": link.bandwidth, f"{where}_latency": link.latency}
    return figures


def calibrated(base: Topology, figures: Mapping[str, Any], world: World) -> Topology:
    """`base` with this machine's ranks and figures. Raises PlanError for too little memory."""
    topology = replace(base, name=f"{base.name}-measured", ranks=world.size, ranks_per_host=world.local_size, **figures)
    if topology.reserve_bytes >= topology.hbm_bytes:
        raise PlanError(
            f"{topology.hbm_bytes} bytes of memory a rank are not more than the {topology.reserve_bytes} that "
            f"{base.name} reserves: use fewer ranks, or another --hardware"
        )
    return topology


def provenance(base: Topology, figures: Mapping[str, Any], measured: Measurement, world: World) -> dict[str, Any]:
    """Date, software, every link and the figures taken from `base`, for the key `measured` of a topology file."""
    links = {
        field.name: {"latency": link.latency, "bandwidth": link.bandwidth}
        for field in fields(Measurement)
        if isinstance(link := getattr(measured, field.name), Link)
    }
    on_cuda = world.device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(world.device) if on_cuda else f"cpu, {torch.get_num_threads()} threads",
        "backend": dist.get_backend(),
        **links,
        f"taken_from_{base.name}": [name for name in FIGURES if name not in figures],
    }


def _groups(world: World) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """(the ranks of this host, the ranks with this local rank on all hosts); None for a group of one."""
    size, local = world.size, world.local_size
    if size % local:
        raise PlanError(f"{size} ranks do not fill hosts of {local}: start as many on every host")
    hosts = [list(range(first, first + local)) for first in range(0, size, local)]
    places = [list(range(place, size, local)) for place in range(local)]
    intra = dist.new_subgroups_by_enumeration(hosts)[0] if local > 1 else None
    inter = dist.new_subgroups_by_enumeration(places)[0] if size > local else None
    return intra, inter


def all_to_all(group: ProcessGroup, device: torch.device, size: int) -> tuple[Work, float]:
    """An all-to-all of `size` bytes a rank, and the bytes that leave each rank in it."""
    ranks = dist.get_world_size(group)
    sent = torch.zeros(ranks, max(1, size // (4 * ranks)), device=device)
    received = torch.empty_like(sent)
    return lambda _: dist.all_to_all_single(received, sent, group=group), sent.nbytes * (ranks - 1) / ranks


def all_reduce(group: ProcessGroup, device: torch.device, size: int) -> tuple[Work, float]:
    """An all-reduce of `size` bytes, and the bytes that leave each rank: of a reduce-scatter and an all-gather."""
    ranks = dist.get_world_size(group)
    values = torch.zeros(max(1, size // 4), device=device)
    return lambda _: dist.all_reduce(values, group=group), 2 * values.nbytes * (ranks - 1) / ranks


def _times(collective: Collective, group: ProcessGroup, world: World, load: Load) -> tuple[list[float], list[float]]:
    """(bytes sent, seconds) for each message size. All groups measure side by side and get the same figures."""
    works = [collective(group, world.device, size) for size in load.message_bytes]
    seconds = [median_seconds(work, world.device, load.repeats, lambda: dist.barrier(group)) for work, _ in works]
    return [sent for _, sent in works], _mean(world, seconds)


def median_seconds(
    work: Work, device: torch.device, repeats: int, start_together: Callable[[], object] = dist.barrier
) -> float:
    """The median seconds of `repeats` turns, after one that warms up."""
    samples = []
    for turn in range(repeats + 1):
        start_together()
        _synchronize(device)
        began = perf_counter()
        work(turn)
        _synchronize(device)
        samples.append(perf_counter() - began)
    return median(samples[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mean(world: World, values: list[float]) -> list[float]:
    return [total / world.size for total in world.all_reduce_sum(values)]

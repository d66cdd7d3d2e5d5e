"""Checks of a cluster before a run. All ranks make them together, and a fault names its host."""

import importlib.metadata
import json
import os
import platform
import socket
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import gr
from gr.cluster.links import LinkRates, measure_links, slow_hosts
from gr.config.run import RunConfig
from gr.dist import World, gpus_out_of_reach, resolve_device
from gr.errors import GRError
from gr.ops.backend import backend_for, force_backend
from gr.planner.for_run import run_topology

MAX_SKEW_SECONDS = 5.0
MIN_SHARE = 0.5  # share of the bandwidth in the plan below which a link is slow
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchmetrics", "tensordict", "numpy", "pyarrow")


@dataclass(frozen=True)
class Finding:
    """The result of one check. faults: a line each, with host, reason and remedy; empty where there are none."""

    check: str
    summary: str
    faults: tuple[str, ...] = ()


def preflight(config: RunConfig | None, world: World, pairing: str) -> Iterator[Finding]:
    """The findings in order, the same on every rank, up to the first check with a fault.

    world: a world of CPU ranks, so that a host whose GPUs are at fault can say so. config: of the run to come; without
    one, operators and run folder are not checked, and links are compared with the default topology. pairing: the reason
    why the packages of this process do not fit together, empty where they do.
    """
    hosts = world.gather_text(socket.gethostname())
    yield Finding("rendezvous", f"{world.size} ranks on {len(set(hosts))} host(s): {', '.join(dict.fromkeys(hosts))}")
    device = config.device if config else "auto"
    checks: list[Callable[[], Finding]] = [
        lambda: versions(world, hosts, pairing),
        lambda: devices(world, hosts, device),
        lambda: clocks(world, hosts),
    ]
    if config is not None:
        checks.insert(2, lambda: operators(world, hosts, config))
        checks.append(lambda: run_folder_is_shared(world, hosts, Path(config.run_dir)))
    if world.size > 1:
        checks.append(lambda: links(world, hosts, config))
    for check in checks:
        finding = check()
        yield finding
        if finding.faults:
            return


def versions(world: World, hosts: Sequence[str], pairing: str) -> Finding:
    """Checks that packages fit together on each host, and that all hosts have the same gr, Python and packages."""
    own = {"gr": gr.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            own[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            own[name] = "none"
    everyone = [json.loads(text) for text in world.gather_text(json.dumps(own))]
    pairings = zip(hosts, world.gather_text(pairing), strict=True)
    faults = list(dict.fromkeys(f"{host}: {text}" for host, text in pairings if text))
    for name in own:
        for host, version, usual in _odd_ones(hosts, [each[name] for each in everyone]):
            faults.append(f"{host}: {name} is {version}, and {usual} elsewhere: install the same versions on all hosts")
    return Finding("versions", ", ".join(f"{k} {v}" for k, v in everyone[0].items() if v != "none"), tuple(faults))


def devices(world: World, hosts: Sequence[str], device: str) -> Finding:
    """Checks that every host has a GPU of one kind for each of its ranks; or, on CPU, that no GPU stays unused."""
    count = torch.cuda.device_count() if device != "cpu" else 0
    kind = torch.cuda.get_device_name(0) if count else "no GPU"
    unusable = gpus_out_of_reach() if device == "auto" else 0
    everyone = [json.loads(text) for text in world.gather_text(json.dumps([kind, count, world.local_size, unusable]))]
    on_gpu = device == "cuda" or any(each[1] for each in everyone)
    remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES there"
    faults = {
        host: f"{host}: torch sees {gpus} GPU(s) for {ranks} rank(s): {remedy}, or start fewer ranks a host"
        for host, (_, gpus, ranks, _) in zip(hosts, everyone, strict=True)
        if on_gpu and gpus < ranks
    }
    for host, kind, usual in _odd_ones(hosts, [each[0] for each in everyone]):
        faults.setdefault(host, f"{host}: has {kind}, and the others have {usual}: {remedy}")
    for host, (*_, out_of_reach) in zip(hosts, everyone, strict=True):
        if out_of_reach:
            faults[host] = (
                f"{host}: offers {out_of_reach} GPU(s), and its torch can use none: install the CUDA build (`gr "
                "doctor` there says how; of an image, KIND=cuda), or set device=cpu"
            )
    summary = f"{everyone[0][0]}, {world.local_size} rank(s) a host" if on_gpu else "CPU, as on all hosts"
    return Finding("devices", summary, tuple(faults.values()))


def operators(world: World, hosts: Sequence[str], config: RunConfig) -> Finding:
    """Checks that every rank can run trainer.kernels: Triton starts, C++ builds (20 seconds, once a machine)."""
    backend, fault = "", ""
    try:
        with force_backend(config.trainer.kernels):
            backend = backend_for(resolve_device(config.device, world.local_rank))
    except GRError as error:
        fault = str(error)
    everyone = [json.loads(text) for text in world.gather_text(json.dumps([backend, fault]))]
    faults = dict.fromkeys(f"{host}: {text}" for host, (_, text) in zip(hosts, everyone, strict=True) if text)
    odd = {host: kind for host, kind, _ in _odd_ones(hosts, [each[0] for each in everyone])}
    usual = next((kind for host, (kind, _) in zip(hosts, everyone, strict=True) if host not in odd), "")
    return Finding("operators", ", ".join([usual, *(f"{kind} on {host}" for host, kind in odd.items())]), tuple(faults))


def clocks(world: World, hosts: Sequence[str], now: Callable[[], float] = time.time) -> Finding:
    """Checks that no clock is off: status.json and logs would mislead, and schedulers' credentials expire early."""
    dist.barrier()
    times = [float(text) for text in world.gather_text(repr(now()))]
    middle = statistics.median_low(times)  # the time of one host, so that one of two clocks is right
    skews = {host: seconds - middle for host, seconds in zip(hosts, times, strict=True)}
    faults = tuple(
        f"{host}: its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}: start its time service (NTP)"
        for host, skew in skews.items()
        if abs(skew) > MAX_SKEW_SECONDS
    )
    return Finding("clocks", f"within {max(times) - min(times):.2f} s", faults)


def run_folder_is_shared(world: World, hosts: Sequence[str], run_dir: Path) -> Finding:
    """Checks that every rank can write into run_dir and sees what rank 0 wrote to it."""
    token = world.from_main(uuid.uuid4().hex)
    mark, fault = run_dir / f".preflight-{token}", ""
    try:
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            mark.touch()
    except OSError as error:
        fault = f"run_dir={run_dir} cannot be written: {error.strerror}; set another one"
    refused = world.from_main(fault)
    if not refused and not world.is_main:
        try:
            os.listdir(run_dir)  # makes a network file system look again
            if mark.exists():
                own = run_dir / f"{mark.name}-{world.rank}"
                own.touch()
                own.unlink()
            else:
                fault = f"run_dir={run_dir} is another folder there than on {hosts[0]}: mount the shared one"
        except FileNotFoundError:
            fault = f"run_dir={run_dir} is not there, and it is on {hosts[0]}: mount the file system that they share"
        except OSError as error:
            fault = f"run_dir={run_dir} cannot be written: {error.strerror}; mend its owner or its mount"
    reasons = world.gather_text(fault)
    if world.is_main and not refused:
        mark.unlink()
    faults = dict.fromkeys(f"{host}: {text}" for host, text in zip(hosts, reasons, strict=True) if text)
    return Finding("run folder", f"{run_dir} is writable and the same for every rank", tuple(faults))


def links(world: World, hosts: Sequence[str], config: RunConfig | None) -> Finding:
    """Checks that all-to-all and all-reduce are as fast as the plan's topology says, and names the slow hosts.

    On CPU without a named topology there is nothing to compare with: the figures are shown, and no fault.
    """
    device = resolve_device(config.device if config else "auto", world.local_rank)
    described = config.planner.topology if config else None
    if world.size % world.local_size:
        fault = f"{world.size} ranks do not fill hosts of {world.local_size}: start as many on each"
        return Finding("links", "", (fault,))
    try:
        topology = run_topology(described, replace(world, device=device))
    except GRError as error:
        return Finding("links", "", (str(error),))
    assumed = topology.inter_bandwidth if topology.hosts > 1 else topology.intra_bandwidth
    rates = measure_links(world, device)
    summary = (
        f"all-to-all {rates.all_to_all / 1e9:.3g}, all-reduce {rates.all_reduce / 1e9:.3g} GB/s a rank; "
        f"{topology.name} assumes {assumed / 1e9:.3g}"
    )
    comparable = described is not None or device.type == "cuda"
    slow = comparable and min(rates.all_to_all, rates.all_reduce) < MIN_SHARE * assumed
    return Finding("links", summary, _slow_links(rates, assumed, hosts[:: world.local_size]) if slow else ())


def _slow_links(rates: LinkRates, assumed: float, hosts: Sequence[str]) -> tuple[str, ...]:
    remedy = "look at its links, or plan with a topology that `gr calibrate` measured here"
    slow = [hosts[host] for host in slow_hosts(rates, MIN_SHARE * assumed, len(hosts))] if rates.pairs else hosts
    if not slow:
        return (f"all hosts together: every pair of hosts is fast, the collectives are not: {remedy}",)
    rate = min(rates.all_to_all, rates.all_reduce, *rates.pairs.values())
    return tuple(
        f"{host}: its links give {rate / 1e9:.3g} GB/s a rank, less than half of {assumed / 1e9:.3g}: {remedy}"
        for host in slow
    )


def _odd_ones(hosts: Sequence[str], values: Sequence[str]) -> list[tuple[str, str, str]]:
    """(host, its value, the usual value) of hosts that differ from most; of two that differ, the second."""
    usual = Counter(values).most_common(1)[0][0]
    odd: Mapping[str, str] = {host: value for host, value in zip(hosts, values, strict=True) if value != usual}
    return [(host, value, usual) for host, value in odd.items()]

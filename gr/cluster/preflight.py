"""Checks of a cluster before a run: one rank a process, all together, and the host that is at fault is named."""

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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import gr
from gr.cluster.links import Links, measure_links, slow_hosts
from gr.config.run import RunConfig
from gr.dist import World, gpus_out_of_reach, resolve_device
from gr.errors import GRError
from gr.ops.backend import backend_for, force_backend
from gr.planner.for_run import run_topology

MOST_SKEW_SECONDS = 5.0
LEAST_SHARE = 0.5  # of the bandwidth that the plan counts on
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchmetrics", "tensordict", "numpy", "pyarrow")


@dataclass(frozen=True)
class Finding:
    """One check. faults: one line each, which names the host, the reason and the remedy; none where all is well."""

    check: str
    summary: str
    faults: tuple[str, ...] = ()


def preflight(config: RunConfig | None, here: World, pairing: str) -> Iterator[Finding]:
    """The findings, as they are made; the same on every rank. Stops after the first check that finds a fault.

    here: a world of CPU ranks, so that a host whose GPUs are at fault can say so. config: of the run to come; without
    one operators and run folder are not checked, and links are compared with the default topology. pairing: why the
    packages of this process do not fit together, empty where they do.
    """
    hosts = here.gather_text(socket.gethostname())
    yield Finding("rendezvous", f"{here.size} ranks on {len(set(hosts))} host(s): {', '.join(dict.fromkeys(hosts))}")
    device = config.device if config else "auto"
    checks: list[Callable[[], Finding]] = [
        lambda: versions(here, hosts, pairing),
        lambda: devices(here, hosts, device),
        lambda: clocks(here, hosts),
    ]
    if config is not None:
        checks.insert(2, lambda: operators(here, hosts, config))
        checks.append(lambda: run_folder_is_shared(here, hosts, Path(config.run_dir)))
    if here.size > 1:
        checks.append(lambda: links(here, hosts, config))
    for check in checks:
        finding = check()
        yield finding
        if finding.faults:
            return


def versions(here: World, hosts: Sequence[str], pairing: str) -> Finding:
    """The packages fit together on each host, and all hosts run the same gr, Python and packages."""
    mine = {"gr": gr.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            mine[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            mine[name] = "none"
    everyone = [json.loads(text) for text in here.gather_text(json.dumps(mine))]
    pairings = zip(hosts, here.gather_text(pairing), strict=True)
    faults = list(dict.fromkeys(f"{host}: {text}" for host, text in pairings if text))
    for name in mine:
        for host, version, usual in _odd_ones(hosts, [each[name] for each in everyone]):
            faults.append(f"{host}: {name} is {version}, and {usual} elsewhere: install the same versions on all hosts")
    return Finding("versions", ", ".join(f"{k} {v}" for k, v in everyone[0].items() if v != "none"), tuple(faults))


def devices(here: World, hosts: Sequence[str], wanted: str) -> Finding:
    """Every host has a GPU of the same kind for each of its ranks; or, on CPU, no host has any to be missed."""
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    kind = torch.cuda.get_device_name(0) if count else "no GPU"
    lost = gpus_out_of_reach() if wanted == "auto" else 0
    everyone = [json.loads(text) for text in here.gather_text(json.dumps([kind, count, here.local_size, lost]))]
    on_gpu = wanted == "cuda" or any(each[1] for each in everyone)
    remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES there"
    faults = {
        host: f"{host}: torch sees {seen} GPU(s) for {ranks} rank(s): {remedy}, or start fewer ranks a host"
        for host, (_, seen, ranks, _) in zip(hosts, everyone, strict=True)
        if on_gpu and seen < ranks
    }
    for host, found, usual in _odd_ones(hosts, [each[0] for each in everyone]):
        faults.setdefault(host, f"{host}: has {found}, and the others have {usual}: {remedy}")
    for host, (*_, out_of_reach) in zip(hosts, everyone, strict=True):
        if out_of_reach:
            faults[host] = (
                f"{host}: offers {out_of_reach} GPU(s), and its torch can use none: install the CUDA build (`gr "
                "doctor` there says how; of an image, KIND=cuda), or set device=cpu"
            )
    summary = f"{everyone[0][0]}, {here.local_size} rank(s) a host" if on_gpu else "CPU, as on all hosts"
    return Finding("devices", summary, tuple(faults.values()))


def operators(here: World, hosts: Sequence[str], config: RunConfig) -> Finding:
    """Every rank can run the operators that are asked for: Triton starts, C++ is built (20 seconds, once a machine)."""
    found, fault = "", ""
    try:
        with force_backend(config.trainer.kernels):
            found = backend_for(resolve_device(config.device, here.local_rank))
    except GRError as error:
        fault = str(error)
    everyone = [json.loads(text) for text in here.gather_text(json.dumps([found, fault]))]
    faults = dict.fromkeys(f"{host}: {text}" for host, (_, text) in zip(hosts, everyone, strict=True) if text)
    odd = {host: kind for host, kind, _ in _odd_ones(hosts, [each[0] for each in everyone])}
    usual = next((kind for host, (kind, _) in zip(hosts, everyone, strict=True) if host not in odd), "")
    return Finding("operators", ", ".join([usual, *(f"{kind} on {host}" for host, kind in odd.items())]), tuple(faults))


def clocks(here: World, hosts: Sequence[str], now: Callable[[], float] = time.time) -> Finding:
    """No host's clock is off: status.json and logs would mislead, and credentials of schedulers expire early."""
    dist.barrier()
    times = [float(text) for text in here.gather_text(repr(now()))]
    middle = statistics.median_low(times)  # somebody's, so that of two clocks one is right
    skews = {host: seconds - middle for host, seconds in zip(hosts, times, strict=True)}
    faults = tuple(
        f"{host}: its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}: start its time service (NTP)"
        for host, skew in skews.items()
        if abs(skew) > MOST_SKEW_SECONDS
    )
    return Finding("clocks", f"within {max(times) - min(times):.2f} s", faults)


def run_folder_is_shared(here: World, hosts: Sequence[str], run_dir: Path) -> Finding:
    """Every rank can write into run_dir, and finds there what rank 0 wrote."""
    token = here.from_main(uuid.uuid4().hex)
    mark, fault = run_dir / f".preflight-{token}", ""
    try:
        if here.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            mark.touch()
    except OSError as error:
        fault = f"run_dir={run_dir} cannot be written: {error.strerror}; set another one"
    refused = here.from_main(fault)
    if not refused and not here.is_main:
        try:
            os.listdir(run_dir)  # makes a network file system look again
            if mark.exists():
                own = run_dir / f"{mark.name}-{here.rank}"
                own.touch()
                own.unlink()
            else:
                fault = f"run_dir={run_dir} is another folder there than on {hosts[0]}: mount the shared one"
        except FileNotFoundError:
            fault = f"run_dir={run_dir} is not there, and it is on {hosts[0]}: mount the file system that they share"
        except OSError as error:
            fault = f"run_dir={run_dir} cannot be written: {error.strerror}; mend its owner or its mount"
    said = here.gather_text(fault)
    if here.is_main and not refused:
        mark.unlink()
    faults = dict.fromkeys(f"{host}: {text}" for host, text in zip(hosts, said, strict=True) if text)
    return Finding("run folder", f"{run_dir} is writable and the same for every rank", tuple(faults))


def links(here: World, hosts: Sequence[str], config: RunConfig | None) -> Finding:
    """All-to-all and all-reduce are as fast as the plan's topology says, or which host they are slow on.

    Where no topology was named, on CPU, nothing was counted on: the figures are shown and no fault.
    """
    device = resolve_device(config.device if config else "auto", here.local_rank)
    described = config.planner.topology if config else None
    if here.size % here.local_size:
        return Finding(
            "links", "", (f"{here.size} ranks do not fill hosts of {here.local_size}: start as many on each",)
        )
    try:
        placed = World(here.rank, here.size, here.local_rank, here.local_size, device)
        topology = run_topology(described, placed)
    except GRError as error:
        return Finding("links", "", (str(error),))
    count = here.size // here.local_size
    assumed = topology.inter_bandwidth if count > 1 else topology.intra_bandwidth
    found = measure_links(here, device)
    summary = (
        f"all-to-all {found.all_to_all / 1e9:.3g}, all-reduce {found.all_reduce / 1e9:.3g} GB/s a rank; "
        f"{topology.name} assumes {assumed / 1e9:.3g}"
    )
    counted_on = described is not None or device.type == "cuda"
    slow = counted_on and min(found.all_to_all, found.all_reduce) < LEAST_SHARE * assumed
    return Finding("links", summary, _slow_links(found, assumed, hosts[:: here.local_size]) if slow else ())


def _slow_links(found: Links, assumed: float, hosts: Sequence[str]) -> tuple[str, ...]:
    wanted, remedy = (
        LEAST_SHARE * assumed,
        "look at its links, or plan with a topology that `gr calibrate` measured here",
    )
    named = [hosts[host] for host in slow_hosts(found, wanted, len(hosts))] if found.pairs else list(hosts)
    if not named:
        return (f"all hosts together: every pair of hosts is fast, the collectives are not: {remedy}",)
    rate = min(found.all_to_all, found.all_reduce, *found.pairs.values())
    return tuple(
        f"{host}: its links give {rate / 1e9:.3g} GB/s a rank, less than half of {assumed / 1e9:.3g}: {remedy}"
        for host in named
    )


def _odd_ones(hosts: Sequence[str], values: Sequence[str]) -> list[tuple[str, str, str]]:
    """(host, its value, the usual value) of hosts that differ from most; of two that differ, the second."""
    usual = Counter(values).most_common(1)[0][0]
    odd: Mapping[str, str] = {host: value for host, value in zip(hosts, values, strict=True) if value != usual}
    return [(host, value, usual) for host, value in odd.items()]

"""`gr calibrate`: measures this machine and writes a topology file for `gr plan --topology`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.table import Table

from gr.cli.out import cell, check_out, say, show, writes
from gr.errors import ConfigError, GRError

if TYPE_CHECKING:
    from gr.cluster.calibrate import Measurement
    from gr.planner.topology import Topology

# Figure of a Topology, its unit and what one of that unit is.
_FIGURES = {
    "hbm_bytes": ("GB", 1e9),
    "host_bytes": ("GB", 1e9),
    "reserve_bytes": ("GB", 1e9),
    "hbm_bandwidth": ("GB/s", 1e9),
    "host_bandwidth": ("GB/s", 1e9),
    "flops_bf16": ("TFLOP/s", 1e12),
    "flops_fp32": ("TFLOP/s", 1e12),
    "intra_bandwidth": ("GB/s", 1e9),
    "intra_latency": ("us", 1e-6),
    "inter_bandwidth": ("GB/s", 1e9),
    "inter_latency": ("us", 1e-6),
}


@click.command(
    help="Measure row lookups, matrix products and, with several ranks (--nproc, or under torchrun), links; "
    "write them as a topology file for `gr plan --topology`. Takes half a minute."
)
@click.option("--out", default="topology.yaml", show_default=True, help="File to write.")
@click.option("--hardware", default=None, help="Supplies what is not measured; default on cpu: cpu.")
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Ranks to start on this host.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--force", is_flag=True, help="Replace the file.")
def command(out: str, hardware: str | None, nproc: int, device: Literal["auto", "cpu", "cuda"], force: bool) -> None:
    path = Path(out)
    check_out(path, force)
    if nproc > 1 and "WORLD_SIZE" in os.environ:
        raise ConfigError("--nproc starts ranks, and so does torchrun: use one of them")
    from gr.dist import resolve_device

    kind = resolve_device(device).type
    base = _base(hardware, kind)
    if nproc > 1:
        _check_devices(nproc, kind)
        _start_ranks(nproc, ["--out", out, "--hardware", hardware or base.name, "--device", device, "--force"])
    else:
        _measure(path, base, device)


def _base(hardware: str | None, device: str) -> "Topology":
    from gr.planner.topology import hardware_names, parse_topology

    if hardware is None and device != "cpu":
        raise ConfigError(
            f"--hardware is needed on {device}: name the nearest of {', '.join(hardware_names())}, or a topology file"
        )
    base = parse_topology(hardware or "cpu")
    if base.device != device:
        raise ConfigError(
            f"--hardware={hardware} is of device {base.device}, and this measurement runs on {device}: "
            f"set --device={base.device}, or name hardware of device {device}"
        )
    return base


def _check_devices(ranks: int, device: str) -> None:
    import torch

    if device == "cuda" and ranks > torch.cuda.device_count():
        raise ConfigError(f"--nproc={ranks}: there are {torch.cuda.device_count()} GPUs here, one for each rank")


def _start_ranks(ranks: int, arguments: list[str]) -> None:
    threads = max(1, (os.cpu_count() or 1) // ranks)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    status = subprocess.run([*torchrun, "-m", "gr", "calibrate", *arguments], env=environment).returncode
    if status:
        raise GRError(f"calibrate: the {ranks} ranks failed with exit code {status}; their own message is above")


def _measure(path: Path, base: "Topology", device: Literal["auto", "cpu", "cuda"]) -> None:
    from gr import logging
    from gr.cluster.calibrate import CPU_LOAD, CUDA_LOAD, calibrated, machine_figures, measure, provenance
    from gr.dist import world
    from gr.planner.topology import to_yaml

    with world(device) as own:
        logging.configure(own.rank)
        measured = measure(own, CPU_LOAD if own.device.type == "cpu" else CUDA_LOAD)
        if not own.is_main:
            return
        figures = machine_figures(measured, own)
        topology = calibrated(base, figures, own)
        with writes("out", path):
            path.write_text(to_yaml(topology, provenance(base, figures, measured, own)), encoding="utf-8")
        _print(base, topology, set(figures))
        _print_links(measured)
    say(f"written: {path}; use it with gr plan --topology {path}")


def _print(base: "Topology", topology: "Topology", figures: set[str]) -> None:
    table = Table(title=cell(f"this machine, {topology.ranks} ranks on {topology.hosts} hosts, against {base.name}"))
    for column in ("of a rank", "here", base.name, "here/there", "unit"):
        table.add_column(column, justify="left" if column in ("of a rank", "unit") else "right")
    for name, (unit, one) in _FIGURES.items():
        own, there = getattr(topology, name), getattr(base, name)
        if name in figures:
            shown, ratio = f"{own / one:,.4g}", f"{own / there:.2f}"
        else:
            shown, ratio = "not measured", ""
        table.add_row(name, shown, f"{there / one:,.4g}", ratio, unit)
    show(table)
    kept = [name for name in _FIGURES if name not in figures]
    say(f"not measured, so the file takes them from {base.name}: {', '.join(kept)}")
    if topology.ranks == 1:
        say("one rank measures no link: use --nproc, or torchrun on several hosts")


def _print_links(measured: "Measurement") -> None:
    for where, link in (("intra", measured.intra_all_reduce), ("inter", measured.inter_all_reduce)):
        if link is not None:
            rate = f"{link.bandwidth / 1e9:,.4g} GB/s, {link.latency * 1e6:,.4g} us"
            say(f"{where}_* are of all-to-all; all-reduce has {rate}")

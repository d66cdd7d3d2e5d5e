"""Calibration on one rank and on two gloo ranks, with loads far too small for the figures to mean anything."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gr.cluster import calibrate
from gr.cluster.calibrate import (
    FIGURES,
    Link,
    Load,
    Measurement,
    calibrated,
    fit_link,
    gemm_flops,
    lookup_bandwidth,
    machine_figures,
    measure,
    provenance,
)
from gr.dist import World
from gr.errors import PlanError
from gr.planner.topology import Topology, parse_topology, to_yaml
from tests.support.ranks import run_ranks

TINY = Load(table_rows=64, lookups=32, gemm_size=16, message_bytes=(1 << 10, 1 << 22), repeats=5)
CPU = parse_topology("cpu")


@pytest.fixture(autouse=True)
def _no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a test share busy cores: whatever the times are, they make a link."""
    monkeypatch.setattr(
        calibrate, "fit_link", lambda sent, seconds: Link(latency=min(seconds), bandwidth=sent[-1] / max(seconds))
    )


def _measure(world_of_rank: World, local_size: int) -> Measurement:
    return measure(replace(world_of_rank, local_size=local_size, local_rank=world_of_rank.rank % local_size), TINY)


def _rates(measured: Measurement) -> tuple[float, float, float]:
    return measured.lookup_bandwidth, measured.flops_bf16, measured.flops_fp32


def test_fit_recovers_a_link() -> None:
    link = Link(latency=20e-6, bandwidth=40e9)
    sent = [4096.0, 1e6, 1e8]
    fitted = fit_link(sent, [link.latency + size / link.bandwidth for size in sent])
    assert fitted.latency == pytest.approx(link.latency) and fitted.bandwidth == pytest.approx(link.bandwidth)


@pytest.mark.parametrize("seconds", [[1e-3, 1.9e-3], [2e-3, 1e-3], [1e-6, 1e-2]])
def test_fit_refuses_noise(seconds: list[float]) -> None:
    with pytest.raises(
        PlanError, match=r"fit no latency and bandwidth \(1000 bytes in .*: run again on a quiet machine"
    ):
        fit_link([1000.0, 2000.0], seconds)


def test_one_rank_measures_no_link(alone: World, tmp_path: Path) -> None:
    measured = measure(alone, TINY)
    assert measured == Measurement(*_rates(measured)) and min(_rates(measured)) > 0
    figures = machine_figures(measured, alone)
    topology = calibrated(CPU, figures, alone)
    assert (topology.name, topology.ranks, topology.hosts) == ("cpu-measured", 1, 1)
    assert topology.intra_bandwidth == CPU.intra_bandwidth and topology.host_bandwidth == topology.hbm_bandwidth
    notes = provenance(CPU, figures, measured, alone)
    assert set(notes["taken_from_cpu"]) | set(figures) == set(FIGURES)
    assert {"intra_bandwidth", "inter_latency", "reserve_bytes"} <= set(notes["taken_from_cpu"])
    path = tmp_path / "here.yaml"
    path.write_text(to_yaml(topology, notes))
    assert parse_topology(str(path)) == topology


@pytest.mark.parametrize(("local_size", "where", "other"), [(2, "intra", "inter"), (1, "inter", "intra")])
def test_two_ranks_measure_the_link_between_them(local_size: int, where: str, other: str) -> None:
    first, second = run_ranks(_measure, 2, local_size)
    assert first == second  # the same file, whichever rank writes it
    for name in ("all_to_all", "all_reduce"):
        link = getattr(first, f"{where}_{name}")
        assert link.latency > 0 and link.bandwidth > 0
        assert getattr(first, f"{other}_{name}") is None
    world_of_rank = World(0, 2, 0, local_size, torch.device("cpu"))
    figures = machine_figures(first, world_of_rank)
    assert figures[f"{where}_bandwidth"] == getattr(first, f"{where}_all_to_all").bandwidth
    assert f"{other}_bandwidth" not in figures
    assert calibrated(CPU, figures, world_of_rank).hosts == 2 // local_size


def test_four_ranks_on_two_hosts_measure_both_links() -> None:
    measured = run_ranks(_measure, 4, 2)[0]
    assert None not in (measured.intra_all_to_all, measured.inter_all_to_all)


def test_hosts_of_unequal_size(alone: World) -> None:
    with pytest.raises(PlanError, match="3 ranks do not fill hosts of 2: start as many on every host"):
        measure(replace(alone, size=3, local_size=2), TINY)


def test_reserve_above_the_memory(alone: World) -> None:
    base: Topology = replace(CPU, reserve_bytes=10**9, hbm_bytes=2 * 10**9)
    with pytest.raises(PlanError, match="500 bytes of memory a rank are not more than the 1000000000 that cpu"):
        calibrated(base, {"hbm_bytes": 500}, alone)


@pytest.mark.gpu
def test_rates_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from gr.dist import world

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    load = Load(1 << 21, 1 << 19, 4096, (1 << 14, 1 << 24), repeats=5)
    with world("cuda") as world_of_rank:
        assert lookup_bandwidth(world_of_rank.device, load) > 1e11
        assert gemm_flops(world_of_rank.device, torch.bfloat16, load) > gemm_flops(
            world_of_rank.device, torch.float32, load
        )
        figures = machine_figures(measure(world_of_rank, load), world_of_rank)
    assert figures["hbm_bytes"] > 10**9 and "host_bandwidth" not in figures

"""Topologies: named hardware and its sources, `name x ranks`, files that read back equal, and wrong inputs."""

from dataclasses import fields, replace
from importlib import resources
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gr.errors import PlanError
from gr.planner.topology import Topology, hardware_names, hardware_of_gpu, parse_topology, to_yaml, with_ranks

WRITTEN = yaml.safe_load(resources.files("gr.planner").joinpath("hardware.yaml").read_text())
NAMES = ("a100-40g", "a100-80g", "h100", "h200", "b200", "gb200", "mi300x", "t4", "cpu")
SCALED = {
    "hbm_bandwidth",
    "host_bandwidth",
    "flops_bf16",
    "flops_fp32",
    "intra_bandwidth",
    "inter_bandwidth",
}
_PLACE = {"name", "device", "ranks"}

positive = st.floats(min_value=1e-9, max_value=1e18)
sizes = st.integers(min_value=2, max_value=10**15)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    each = draw(st.integers(1, 72))
    hbm = draw(sizes)
    return Topology(
        name=draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9 ._+-]*\Z")),
        device=draw(st.sampled_from(["cuda", "cpu"])),
        ranks=each * draw(st.integers(1, 4096)),
        ranks_per_host=each,
        hbm_bytes=hbm,
        host_bytes=draw(st.integers(0, 10**15)),
        hbm_bandwidth=draw(positive),
        host_bandwidth=draw(positive),
        flops_bf16=draw(positive),
        flops_fp32=draw(positive),
        peak_bf16=draw(positive),
        peak_fp32=draw(positive),
        intra_bandwidth=draw(positive),
        inter_bandwidth=draw(positive),
        intra_latency=draw(st.floats(0, 1)),
        inter_latency=draw(st.floats(0, 1)),
        reserve_bytes=draw(st.integers(0, hbm - 1)),
    )


@pytest.fixture
def wrong(tmp_path: Path):
    """wrong(text): what the one line of the PlanError says after the file's name."""

    def read(text: str) -> str:
        path = tmp_path / "t.yaml"
        path.write_text(text)
        with pytest.raises(PlanError) as caught:
            parse_topology(str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(str(path))

    return read


def test_hardware_names() -> None:
    assert hardware_names() == NAMES


def test_every_gpu_names_its_hardware() -> None:
    boards = {name: entry.get("gpu") for name, entry in WRITTEN["hardware"].items()}
    assert all((gpu is None) == (name == "cpu") for name, gpu in boards.items())
    assert [hardware_of_gpu(gpu) for gpu in boards.values() if gpu] == list(NAMES[:-1])
    assert hardware_of_gpu("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str) -> None:
    entry = WRITTEN["hardware"][name]
    assert set(entry["figures"]) == {field.name for field in fields(Topology)} - _PLACE - {"peak_bf16", "peak_fp32"}
    assert set(entry["efficiency"]) == SCALED
    for figure in (*entry["figures"].values(), *entry["efficiency"].values()):
        key, _, statement = figure["source"].partition(": ")
        assert statement and (key == "assumed" or key in WRITTEN["sources"])
    assert all(0 < part["value"] < 1 for part in entry["efficiency"].values())


def test_every_source_is_used() -> None:
    sources = [
        figure["source"]
        for entry in WRITTEN["hardware"].values()
        for figure in (*entry["figures"].values(), *entry["efficiency"].values())
    ]
    assert [key for key in WRITTEN["sources"] if not any(key in source for source in sources)] == []


@pytest.mark.parametrize("name", NAMES)
def test_named_hardware_is_one_host(name: str) -> None:
    topology = parse_topology(name)
    assert (topology.name, topology.hosts, topology.ranks) == (name, 1, topology.ranks_per_host)
    assert topology.intra_bandwidth > topology.inter_bandwidth
    assert topology.reserve_bytes < 0.15 * topology.hbm_bytes


def test_bandwidth_is_peak_times_efficiency() -> None:
    h100 = parse_topology("h100")
    assert h100.hbm_bandwidth == pytest.approx(3.35e12 * 0.8)
    assert h100.flops_bf16 == pytest.approx(989.5e12 * 0.73)
    assert (h100.hbm_bytes, h100.host_bytes) == (int(79.11 * 2**30), 250 * 10**9)


@pytest.mark.parametrize(
    ("text", "name", "ranks", "ranks_per_host"),
    [
        ("h100x64", "h100", 64, 8),
        ("h100x8", "h100", 8, 8),
        ("h100x4", "h100", 4, 4),
        ("h100x1", "h100", 1, 1),
        ("gb200x144", "gb200", 144, 72),
        ("mi300x", "mi300x", 8, 8),
        ("mi300xx16", "mi300x", 16, 8),
        ("cpux2", "cpu", 2, 2),
    ],
)
def test_name_and_ranks(text: str, name: str, ranks: int, ranks_per_host: int) -> None:
    topology = parse_topology(text)
    assert (topology.name, topology.ranks, topology.ranks_per_host) == (name, ranks, ranks_per_host)
    assert topology == with_ranks(parse_topology(name), ranks)


def test_overrides_come_last() -> None:
    changed = parse_topology("h100x64", {"ranks_per_host": 4, "hbm_bytes": "70 GiB", "inter_bandwidth": "12.5 GB/s"})
    assert changed == replace(parse_topology("h100x64"), ranks_per_host=4, hbm_bytes=70 * 2**30, inter_bandwidth=12.5e9)


def test_file_over_named_hardware(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("hardware: h100\nranks: 32\nhbm_bytes: 80 GB\nmeasured: {anything: [1, {two: 3}]}\n")
    assert parse_topology(str(path)) == replace(parse_topology("h100x32"), hbm_bytes=80 * 10**9)
    assert parse_topology(str(path), {"ranks": 64}).hosts == 8


def test_file_without_ranks_is_one_host(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yml"
    path.write_text("hardware: h100\nname: ours\nranks_per_host: 16\nhbm_bytes: 8e10\n")
    topology = parse_topology(str(path))
    assert (topology.name, topology.ranks, topology.hbm_bytes) == ("ours", 16, 80 * 10**9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("topologies")


@given(topology=topologies())
def test_a_file_reads_back_equal(folder: Path, topology: Topology) -> None:
    path = folder / "t.yaml"
    path.write_text(to_yaml(topology, {"date": "2026-11-23", "torch": "2.13", "links": {"latency": 1e-5}}))
    assert parse_topology(str(path)) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10", f"h10: unknown hardware 'h10'; did you mean 'h100'? (known: {', '.join(NAMES)})"),
        ("a100x8", "a100x8: unknown hardware 'a100'; did you mean 'a100-40gx8' or 'a100-80gx8'? (known: "),
        ("a100", "a100: unknown hardware 'a100'; did you mean 'a100-40g' or 'a100-80g'? (known: "),
        ("mi300x8", "mi300x8: unknown hardware 'mi300'; did you mean 'mi300xx8'? (known: "),
        ("tpu-v5", "tpu-v5: unknown hardware 'tpu-v5'; (known: a100-40g, "),
        ("h100x12", "h100: 12 ranks do not fill hosts of 8: use 8 or 16 ranks, or set ranks_per_host in a topology"),
        ("h100x0", "h100x0: ranks: should be greater than 0, got 0"),
        ("none/such.yaml", "none/such.yaml: no such file"),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_topology(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hardware: h100\nhbm_byte: 3\n", ":2: hbm_byte: unknown key; did you mean 'hbm_bytes'? (known: device, "),
        ("hardware: h1000\n", ":1: unknown hardware 'h1000'; did you mean 'h100'? (known: "),
        ("hardware: h100\nhbm_bytes: 0\n", ":2: hbm_bytes: should be greater than 0, got 0"),
        ("hardware: h100\nhbm_bytes: 80 gigs\n", ":2: hbm_bytes: expected a number or an amount like '80 GB' or"),
        ("hardware: h100\nhbm_bytes: 1.5\n", ":2: hbm_bytes: expected an integer, got 1.5"),
        ("hardware: h100\nhbm_bandwidth: 3 TB\n", ":2: hbm_bandwidth: expected a number or an amount like '80 GB/s'"),
        ("hardware: h100\nintra_latency: -1\n", ":2: intra_latency: should be greater than or equal to 0, got -1"),
        ("hardware: h100\nranks: '8'\n", ":2: ranks: expected an integer, got '8'"),
        ("hardware: h100\nreserve_bytes: 90 GB\n", ": reserve_bytes=90000000000 leaves nothing of hbm_bytes="),
        ("hardware: h100\ndevice: tpu\n", ":2: device: 'tpu' is not allowed; did you mean 'cpu'? (allowed: cuda, cpu)"),
        ("hbm_bytes: 80 GB\n", ": device, ranks, ranks_per_host, host_bytes, hbm_bandwidth, "),
        ("hardware: h100\nranks: 5\nranks_per_host: 2\n", "h100: 5 ranks do not fill hosts of 2: use 4 or 6 ranks"),
        ("hardware: !!python/object:os.system h100\n", ":1: YAML tags ("),
        ("- h100\n", ":1: top level must be `key: value` lines"),
    ],
)
def test_wrong_files(wrong, text: str, message: str) -> None:
    assert wrong(text).startswith(message)


def test_wrong_overrides() -> None:
    with pytest.raises(PlanError, match=r"^override 'hbm_byte=3': hbm_byte: unknown key; did you mean 'hbm_bytes'"):
        parse_topology("h100x8", {"hbm_byte": 3})
    with pytest.raises(PlanError, match=r"^override 'flops_bf16=inf': flops_bf16: should be a finite number"):
        parse_topology("h100x8", {"flops_bf16": float("inf")})


def test_ranks_of_a_topology() -> None:
    h100 = parse_topology("h100")
    assert with_ranks(h100, 3).ranks_per_host == 3
    with pytest.raises(PlanError, match="h100: 0 ranks; use at least 1"):
        with_ranks(h100, 0)

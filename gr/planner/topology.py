"""The machine a plan is for: ranks, hosts, memories, links. Numbers and their sources are in hardware.yaml."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError

from gr.config.base import Section
from gr.config.messages import describe_faults
from gr.config.yaml import Node, Reader
from gr.errors import PlanError


@dataclass(frozen=True)
class Topology:
    """`ranks` equal ranks on hosts of `ranks_per_host`. All figures are per rank, in bytes, seconds, FLOP/s.

    Bandwidths are what a well-written kernel gets, one direction: the published peak times the efficiency in
    hardware.yaml, or a measurement of `gr calibrate`.
    """

    name: str
    device: str  # cuda or cpu
    ranks: int
    ranks_per_host: int
    hbm_bytes: int  # host memory on cpu
    host_bytes: int  # for offloaded tables
    hbm_bandwidth: float
    host_bandwidth: float
    flops_bf16: float
    flops_fp32: float
    peak_bf16: float  # published FLOP/s, the denominator of MFU
    peak_fp32: float
    intra_bandwidth: float
    inter_bandwidth: float
    intra_latency: float  # seconds a collective takes with next to nothing to send
    inter_latency: float
    reserve_bytes: int  # context, collectives, what the allocator cannot use

    @property
    def hosts(self) -> int:
        return self.ranks // self.ranks_per_host


_UNITS = {"B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("k" if base == 1000 else "K", "M", "G", "T"), start=1)
}


def _in_bytes(value: Any, suffix: str = "") -> Any:
    """'80 GiB' as a number of bytes; whole floats as integers; everything else as it is, for pydantic to judge."""
    if isinstance(value, float) and value.is_integer() and not suffix:
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)}){suffix}", value)
    if match is None:
        raise ValueError(f"expected a number or an amount like '80 GB{suffix}' or '80 GiB{suffix}', got {value!r}")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def _in_bytes_a_second(value: Any) -> Any:
    return _in_bytes(value, "/s")


Size = Annotated[int, BeforeValidator(_in_bytes), Field(gt=0)]
SizeOrNone = Annotated[int, BeforeValidator(_in_bytes), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_in_bytes_a_second), Field(gt=0, allow_inf_nan=False)]
Flops = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TopologyConfig(Section):
    """A topology as a user writes it: named hardware with some of its figures replaced, or every figure."""

    hardware: str | None = Field(None, description="Named hardware that supplies what is not set here.")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$")] | None = None
    device: Literal["cuda", "cpu"] | None = None
    ranks: PositiveInt | None = Field(None, description="Unset: those of one host.")
    ranks_per_host: PositiveInt | None = Field(None, description="Ranks that the fast link joins.")
    hbm_bytes: Size | None = None
    host_bytes: SizeOrNone | None = None
    hbm_bandwidth: Rate | None = None
    host_bandwidth: Rate | None = None
    flops_bf16: Flops | None = None
    flops_fp32: Flops | None = None
    peak_bf16: Flops | None = Field(None, description="Published FLOP/s, for MFU; unset: flops_bf16.")
    peak_fp32: Flops | None = None
    intra_bandwidth: Rate | None = None
    inter_bandwidth: Rate | None = None
    intra_latency: Seconds | None = None
    inter_latency: Seconds | None = None
    reserve_bytes: SizeOrNone | None = None
    measured: dict[str, Any] = Field({}, description="What `gr calibrate` did; read by people only.")


def parse_topology(text: str, overrides: Mapping[str, Any] | None = None) -> Topology:
    """The topology of `h100x64` (hardware x ranks), `h100` (one host of it) or a YAML file; then `overrides` by field.

    Raises PlanError: unknown hardware or key, a figure that is wrong or missing, ranks that do not fill hosts.
    """
    is_file = "/" in text or text.endswith((".yaml", ".yml"))
    tree = _read(text) if is_file else _named(text)
    plain = tree.plain() | dict(overrides or {})
    added = {key: Node(value, f"override '{key}={value}'") for key, value in (overrides or {}).items()}
    tree = Node(tree.value | added, tree.origin)
    try:
        config = TopologyConfig.model_validate(plain, strict=True)
    except ValidationError as error:
        faults = describe_faults(TopologyConfig, error.errors(include_url=False), tree)
        raise PlanError("; ".join(faults)) from None
    given = config.model_dump(exclude_none=True, exclude={"hardware", "measured"})
    figures: dict[str, Any] = {"name": config.hardware or Path(text).stem}
    if config.hardware is not None:
        figures |= _figures_of(config.hardware, tree, text)
    return _topology(figures | given, text)


def with_ranks(topology: Topology, ranks: int) -> Topology:
    """As many ranks of the same hardware. Raises PlanError unless they are part of one host or fill whole hosts."""
    each = topology.ranks_per_host
    if ranks < 1:
        raise PlanError(f"{topology.name}: {ranks} ranks; use at least 1")
    if ranks > each and ranks % each:
        below = ranks // each * each
        raise PlanError(
            f"{topology.name}: {ranks} ranks do not fill hosts of {each}: use {below} or {below + each} ranks, "
            "or set ranks_per_host in a topology file"
        )
    return replace(topology, ranks=ranks, ranks_per_host=min(ranks, each))


def hardware_names() -> tuple[str, ...]:
    """What may stand before the x of `h100x64`."""
    return tuple(_hardware())


def to_yaml(topology: Topology, measured: Mapping[str, Any] | None = None) -> str:
    """A file that `parse_topology` reads back as an equal topology. `measured`: for people, kept under that key."""
    # JSON's scalars are YAML's, and Python writes every float so that it reads back equal.
    lines = [f"{field.name}: {json.dumps(getattr(topology, field.name))}\n" for field in fields(Topology)]
    if measured:
        lines.append(yaml.safe_dump({"measured": dict(measured)}, sort_keys=False, width=120))
    return "# Per rank, in bytes, bytes/s, FLOP/s and seconds. Read by `gr plan --topology FILE`.\n" + "".join(lines)


def _read(path: str) -> Node:
    reader = Reader({})
    tree = reader.read(path, ())
    if reader.faults:
        raise PlanError("; ".join(reader.faults))
    return tree


def _named(text: str) -> Node:
    """`mi300xx8` is 8 ranks of mi300x: the last x divides."""
    match = re.fullmatch(r"(.+)x([0-9]+)", text)
    if match is None or text in _hardware():
        return Node({"hardware": Node(text, text)}, text)
    return Node({"hardware": Node(match[1], text), "ranks": Node(int(match[2]), text)}, text)


def _figures_of(hardware: str, tree: Node, text: str) -> dict[str, Any]:
    known = _hardware()
    if hardware in known:
        return known[hardware]
    near = difflib.get_close_matches(hardware, known, n=1, cutoff=0.5)
    ending = text.removeprefix(hardware) if text.startswith(hardware) else ""  # x64
    suggestion = f"did you mean '{near[0]}{ending}'? " if near else ""
    raise PlanError(
        f"{tree.origin_of(('hardware',))}: unknown hardware '{hardware}'; {suggestion}(known: {', '.join(known)})"
    )


def _topology(figures: dict[str, Any], text: str) -> Topology:
    figures.setdefault("ranks", figures.get("ranks_per_host"))
    for precision in ("bf16", "fp32"):
        figures.setdefault(f"peak_{precision}", figures.get(f"flops_{precision}"))
    missing = [field.name for field in fields(Topology) if figures.get(field.name) is None]
    if missing:
        raise PlanError(
            f"{text}: {', '.join(missing)} not set; set them, or set `hardware` to take them from one of: "
            f"{', '.join(_hardware())}"
        )
    topology = Topology(**figures)
    if topology.reserve_bytes >= topology.hbm_bytes:
        raise PlanError(
            f"{text}: reserve_bytes={topology.reserve_bytes} leaves nothing of hbm_bytes={topology.hbm_bytes}; lower it"
        )
    return with_ranks(topology, topology.ranks)


@cache
def _hardware() -> dict[str, dict[str, Any]]:
    """Named hardware -> figures, with bandwidths and FLOP/s as a good kernel gets them: peak x efficiency."""
    written = yaml.safe_load(resources.files("gr.planner").joinpath("hardware.yaml").read_text(encoding="utf-8"))
    found = {}
    for name, entry in written["hardware"].items():
        plain = {key: figure["value"] for key, figure in entry["figures"].items()}
        config = TopologyConfig.model_validate({"device": entry["device"], **plain})
        figures = config.model_dump(exclude_none=True, exclude={"measured"})
        figures |= {"peak_bf16": figures["flops_bf16"], "peak_fp32": figures["flops_fp32"]}
        figures |= {key: figures[key] * part["value"] for key, part in entry["efficiency"].items()}
        found[name] = figures
    return found

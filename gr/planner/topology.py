"""The machine that a plan is for: ranks, hosts, memories, links. hardware.yaml has the numbers and their sources."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, create_model

from gr.config.base import LARGEST, Section
from gr.config.inventory import LARGEST_TOTAL, LARGEST_WORLD
from gr.config.messages import describe_faults
from gr.config.yaml import Node, Reader
from gr.errors import PlanError

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


Ranks = Annotated[int, Field(gt=0, le=LARGEST_WORLD)]
Size = Annotated[int, BeforeValidator(_in_bytes), Field(gt=0, le=LARGEST)]
SizeOrNone = Annotated[int, BeforeValidator(_in_bytes), Field(ge=0, le=LARGEST)]
Rate = Annotated[float, BeforeValidator(_in_bytes_a_second), Field(gt=0, le=LARGEST_TOTAL, allow_inf_nan=False)]
Flops = Annotated[float, Field(gt=0, le=LARGEST_TOTAL, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]


@dataclass(frozen=True)
class Topology:
    """`ranks` equal ranks on hosts of `ranks_per_host`. All figures are per rank, in bytes, seconds, FLOP/s.

    Bandwidths are what a well-written kernel gets, one direction: the published peak times the efficiency in
    hardware.yaml, or a measurement of `gr calibrate`. The constructor checks nothing: the limits in the annotations are
    for what is read from files (TopologyConfig, planfile.py).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    device: Literal["cuda", "cpu"]
    ranks: Ranks
    ranks_per_host: Ranks  # joined by the fast link
    hbm_bytes: Size  # host memory on cpu
    host_bytes: SizeOrNone  # for offloaded tables
    hbm_bandwidth: Rate
    host_bandwidth: Rate
    flops_bf16: Flops
    flops_fp32: Flops
    peak_bf16: Flops  # published FLOP/s, the denominator of MFU
    peak_fp32: Flops
    intra_bandwidth: Rate
    inter_bandwidth: Rate
    intra_latency: Seconds  # a collective with next to nothing to send
    inter_latency: Seconds
    reserve_bytes: SizeOrNone  # context, collectives, what the allocator cannot use

    @property
    def hosts(self) -> int:
        return self.ranks // self.ranks_per_host


class _NamedHardware(Section):
    """The keys of a topology file that are no figures."""

    hardware: str | None = Field(None, description="Named hardware that supplies what is not set in the file.")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$")] | None = None
    measured: dict[str, Any] = Field({}, description="How `gr calibrate` measured the figures; read by people only.")


_FIGURES: dict[str, Any] = {
    name: (hint | None, None)
    for name, hint in get_type_hints(Topology, include_extras=True).items()
    if name in {field.name for field in fields(Topology)} - {"name"}
}
# A topology as a user writes it: named hardware with some of its figures replaced, or every figure of Topology. Unset
# ranks are those of one host, unset peaks the FLOP/s.
TopologyConfig: type[_NamedHardware] = create_model("TopologyConfig", __base__=_NamedHardware, **_FIGURES)


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
    written = config.model_dump(exclude_none=True, exclude={"hardware", "measured"})
    figures: dict[str, Any] = {"name": config.hardware or Path(text).stem}
    if config.hardware is not None:
        figures |= _figures_of(config.hardware, tree, text)
    return _topology(figures | written, text)


def with_ranks(topology: Topology, ranks: int) -> Topology:
    """The same hardware with `ranks` ranks. Raises PlanError unless they are part of one host or fill whole hosts."""
    local = topology.ranks_per_host
    if ranks < 1:
        raise PlanError(f"{topology.name}: {ranks} ranks; use at least 1")
    if ranks > local and ranks % local:
        below = ranks // local * local
        raise PlanError(
            f"{topology.name}: {ranks} ranks do not fill hosts of {local}: use {below} or {below + local} ranks, "
            "or set ranks_per_host in a topology file"
        )
    return replace(topology, ranks=ranks, ranks_per_host=min(ranks, local))


def hardware_names() -> tuple[str, ...]:
    """The names that may stand before the x of `h100x64`."""
    return tuple(_hardware())


def hardware_of_gpu(gpu: str) -> str | None:
    """The hardware whose GPUs torch.cuda.get_device_name() calls `gpu`; None where hardware.yaml has no such board."""
    return next((name for name, entry in _written().items() if entry.get("gpu") == gpu), None)


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
    if len(match[2]) > len(str(LARGEST_WORLD)):
        raise PlanError(f"{text[:40]}...: {len(match[2])} digits of ranks; give at most {LARGEST_WORLD}")
    return Node({"hardware": Node(match[1], text), "ranks": Node(int(match[2]), text)}, text)


def _figures_of(hardware: str, tree: Node, text: str) -> dict[str, Any]:
    known = _hardware()
    if hardware in known:
        return known[hardware]
    # A name that leaves out the memory, like a100, is that of every size; otherwise the nearest spelling.
    sizes = [name for name in known if name.startswith(f"{hardware}-")]
    near = sizes or difflib.get_close_matches(hardware, known, n=1, cutoff=0.5)
    ending = text.removeprefix(hardware) if text.startswith(hardware) else ""  # x64
    suggestion = "did you mean " + " or ".join(f"'{name}{ending}'" for name in near) + "? " if near else ""
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
def _written() -> dict[str, Any]:
    """Named hardware as hardware.yaml has it."""
    text = resources.files("gr.planner").joinpath("hardware.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["hardware"]


@cache
def _hardware() -> dict[str, dict[str, Any]]:
    """Named hardware -> figures, with bandwidths and FLOP/s as a good kernel gets them: peak x efficiency."""
    hardware = {}
    for name, entry in _written().items():
        plain = {key: figure["value"] for key, figure in entry["figures"].items()}
        config = TopologyConfig.model_validate({"device": entry["device"], **plain})
        figures = config.model_dump(exclude_none=True, exclude={"measured"})
        figures |= {"peak_bf16": figures["flops_bf16"], "peak_fp32": figures["flops_fp32"]}
        figures |= {key: figures[key] * part["value"] for key, part in entry["efficiency"].items()}
        hardware[name] = figures
    return hardware

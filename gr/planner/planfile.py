"""A plan as JSON: everything needed to train with it, to report it again and to know what it is for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gr.config.base import LARGEST
from gr.config.dlrm import ROW_MULTIPLE
from gr.config.inventory import LARGEST_TOTAL, LARGEST_WORLD, AnyShardingType, InventoryConfig, Kernel, TableConfig
from gr.errors import PlanError
from gr.files import is_transient
from gr.planner.enumerate import COLUMN_TYPES, row_parts
from gr.planner.estimate import evaluate
from gr.planner.placement import Placement, Plan, column_blocks
from gr.planner.topology import Topology

FORMAT = "gr-plan-1"
TABLE_IDENTITY = {"name", "rows", "dim", "dtype", "kind", "pooling", "features", "optimizer"}
TOPOLOGY_IDENTITY = ("device", "ranks", "ranks_per_host")

_Ranks = Annotated[int, Field(gt=0, le=LARGEST_WORLD)]
_Bytes = Annotated[int, Field(ge=0, le=LARGEST)]
_Rate = Annotated[float, Field(gt=0.0, le=LARGEST_TOTAL, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0.0, le=LARGEST, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Topology(_Part):
    """Every field of Topology."""

    name: str
    device: Literal["cuda", "cpu"]
    ranks: _Ranks
    ranks_per_host: _Ranks
    hbm_bytes: Annotated[int, Field(gt=0, le=LARGEST)]
    host_bytes: _Bytes
    hbm_bandwidth: _Rate
    host_bandwidth: _Rate
    flops_bf16: _Rate
    flops_fp32: _Rate
    peak_bf16: _Rate
    peak_fp32: _Rate
    intra_bandwidth: _Rate
    inter_bandwidth: _Rate
    intra_latency: _Seconds
    inter_latency: _Seconds
    reserve_bytes: _Bytes


class _Placement(_Part):
    table: str
    sharding_type: AnyShardingType
    kernel: Kernel
    ranks: list[int] | Literal["all"]
    column_width: int | None = None


class _File(_Part):
    format: Literal["gr-plan-1"]
    model_hash: str
    topology_hash: str
    bound_seconds: _Seconds
    predicted: dict[str, Any] | None = None
    topology: _Topology
    inventory: InventoryConfig
    placements: list[_Placement]


def model_hash(inventory: InventoryConfig) -> str:
    """Of what a plan depends on in a model: its tables and dense part. Batch size and id statistics are left out."""
    tables = [table.model_dump(mode="json", include=TABLE_IDENTITY) for table in inventory.tables]
    return _digest([tables, inventory.dense.model_dump(mode="json")])


def topology_hash(topology: Topology) -> str:
    """Of the kind of device, the ranks and their hosts. A plan stays valid when bandwidths are known better."""
    return _digest([getattr(topology, name) for name in TOPOLOGY_IDENTITY])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def dump_plan(plan: Plan, predicted: Mapping[str, Any] | None = None) -> str:
    """JSON that `parse_plan` reads back to an equal plan. predicted: figures for readers, ignored when read back."""
    everywhere = tuple(range(plan.topology.ranks))
    placements = [
        {
            "table": placement.table,
            "sharding_type": placement.sharding_type,
            "kernel": placement.kernel,
            "ranks": "all" if placement.ranks == everywhere else list(placement.ranks),
            **({} if placement.column_width is None else {"column_width": placement.column_width}),
        }
        for placement in plan.placements
    ]
    content = {
        "format": FORMAT,
        "model_hash": model_hash(plan.inventory),
        "topology_hash": topology_hash(plan.topology),
        "bound_seconds": plan.bound_seconds,
        **({} if predicted is None else {"predicted": dict(predicted)}),
        "topology": asdict(plan.topology),
        "inventory": plan.inventory.model_dump(mode="json", exclude_defaults=True)
        # Whole, because pydantic tells its kinds apart by a field that may be a default.
        | {"dense": plan.inventory.dense.model_dump(mode="json")},
    }
    # A line a placement, so that two plans can be compared by eye.
    lines = ",\n".join(f"  {json.dumps(placement)}" for placement in placements)
    return f'{json.dumps(content, indent=1)[:-2]},\n "placements": [\n{lines}\n ]\n}}\n'


def load_plan(path: Path) -> Plan:
    """Raises PlanError where the file cannot be read or is not a whole plan."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        if is_transient(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise PlanError(f"{path}: cannot be read: {reason}; write one with `gr plan CONFIG --json {path}`") from error
    return parse_plan(text, str(path))


def parse_plan(text: str, origin: str = "plan") -> Plan:
    """The plan of `dump_plan`, checked: every table is placed once, wholly, on ranks that exist. Raises PlanError."""
    content = _json(text, origin)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{origin}: not a plan of this version ({FORMAT}); make it again with `gr plan --json`")
    try:
        # Strict JSON, as for configurations: a list is a tuple, text is only text.
        file = _File.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}." for part in first["loc"])[:-1]
        said = ": ".join(part for part in (origin, where, first["msg"].lower()) if part)
        raise PlanError(f"{said}; make the plan again with `gr plan --json`") from error
    topology = Topology(**file.topology.model_dump())
    if topology.ranks % topology.ranks_per_host:
        raise PlanError(f"{origin}: {topology.ranks} ranks do not fill hosts of {topology.ranks_per_host}")
    for name, stated, found in (
        ("model_hash", file.model_hash, model_hash(file.inventory)),
        ("topology_hash", file.topology_hash, topology_hash(topology)),
    ):
        if stated != found:
            raise PlanError(
                f"{origin}: {name} says {stated}, its content is {found}: it was edited; make the plan again"
            )
    return Plan(file.inventory, topology, _placements(file, topology, origin), file.bound_seconds)


def _json(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{origin}: line {error.lineno} is not JSON: {error.msg}") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise PlanError(f"{origin}: not a usable number: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{origin}: nested too deep to be a plan; make it again with `gr plan --json`") from error


def _placements(file: _File, topology: Topology, origin: str) -> tuple[Placement, ...]:
    given: dict[str, _Placement] = {}
    for placement in file.placements:
        if placement.table in given:
            raise PlanError(f"{origin}: table {placement.table} is placed twice")
        given[placement.table] = placement
    names = [table.name for table in file.inventory.tables]
    if strange := sorted(set(given) - set(names)):
        raise PlanError(f"{origin}: places {strange[0]}, which is no table of its inventory")
    if missing := [name for name in names if name not in given]:
        raise PlanError(f"{origin}: has no placement for table {missing[0]}; make the plan again with `gr plan --json`")
    return tuple(_placement(table, given[table.name], topology, origin) for table in file.inventory.tables)


def _placement(table: TableConfig, given: _Placement, topology: Topology, origin: str) -> Placement:
    ranks = tuple(range(topology.ranks)) if given.ranks == "all" else tuple(given.ranks)
    placement = Placement(table.name, given.sharding_type, given.kernel, ranks, given.column_width)
    if fault := placement_fault(table, placement, topology):
        raise PlanError(f"{origin}: table {table.name}: {fault}")
    return placement


def placement_fault(table: TableConfig, placement: Placement, topology: Topology) -> str | None:
    """What makes a placement impossible, or None."""
    kind, ranks, width = placement.sharding_type, placement.ranks, placement.column_width
    if kind not in table.valid_sharding_types():
        return f"{kind} {table.why_invalid(kind)}"
    if kind == "data_parallel" and placement.kernel != "dense":
        return f"data_parallel has kernel dense, not {placement.kernel}"
    if kind != "data_parallel" and placement.kernel == "dense" and "dense" not in table.kernels:
        return f"{kind} does not go with kernel dense, unless the table's kernels allow it: {', '.join(table.kernels)}"
    if (width is not None) != (kind in COLUMN_TYPES):
        return f"column_width={width} does not go with {kind}"
    if width is not None and (not 0 < width <= table.dim or width % ROW_MULTIPLE):
        return f"column_width={width} is not a multiple of {ROW_MULTIPLE} up to dim={table.dim}"
    if wrong := [rank for rank in ranks if not 0 <= rank < topology.ranks]:
        return f"rank {wrong[0]} is not one of 0 to {topology.ranks - 1}"
    blocks = len(column_blocks(table.dim, width))
    count = topology.ranks if kind == "data_parallel" else blocks * row_parts(kind, topology)
    if len(ranks) != count:
        return f"{kind} has {count} shards here, and ranks names {len(ranks)}"
    if kind in ("data_parallel", "row_wise") and ranks != tuple(range(count)):
        return f"{kind} has a shard on every rank, in order; ranks does not"
    if len(set(ranks)) != len(ranks):
        return "two of its shards are on one rank"
    hosts = [rank // topology.ranks_per_host for rank in ranks]
    if kind == "table_column_wise" and len(set(hosts)) > 1:
        return "table_column_wise stays on one host; ranks does not"
    if kind in ("table_row_wise", "grid_shard"):
        local = topology.ranks_per_host
        starts = [ranks[i - i % local] for i in range(len(ranks))]
        if any(
            start % local or rank != start + i % local
            for i, (rank, start) in enumerate(zip(ranks, starts, strict=True))
        ):
            return f"{kind} takes all ranks of a host, in order; ranks does not"
    return None


def differences(plan: Plan, inventory: InventoryConfig, topology: Topology) -> list[tuple[str, str, str]]:
    """(what, the plan's, the other): what of model and topology is another one, with hashes and descriptions."""
    found = [
        ("model", model_hash(plan.inventory), model_hash(inventory)),
        ("topology", topology_hash(plan.topology), topology_hash(topology)),
    ]
    return [
        (
            what,
            f"{of_plan} ({_described(what, plan.inventory, plan.topology)})",
            f"{other} ({_described(what, inventory, topology)})",
        )
        for what, of_plan, other in found
        if of_plan != other
    ]


def check_plan(plan: Plan, inventory: InventoryConfig, topology: Topology) -> None:
    """Raises PlanError where `plan` was made for another model or topology, or does not fit its own topology."""
    for what, of_plan, here in differences(plan, inventory, topology):
        raise PlanError(
            f"the plan is for another {what}: {of_plan}, and this run has {here}; make one with `gr plan CONFIG --json`"
            + (", or let the run make one with planner.replan=true" if what == "topology" else "")
        )
    evaluation, own = evaluate(plan), plan.topology
    if not evaluation.fits:
        rank = int(evaluation.total_memory_R.argmax())
        raise PlanError(
            f"the plan does not fit its own topology: rank {rank} needs {evaluation.total_memory_R[rank]:.0f} of "
            f"{own.hbm_bytes} bytes, and a rank offloads up to {evaluation.host_R.max():.0f} bytes to {own.host_bytes} "
            "of host memory; make one with `gr plan CONFIG --json`"
        )


def _described(what: str, inventory: InventoryConfig, topology: Topology) -> str:
    if what == "topology":
        return f"{topology.device}, {topology.ranks} ranks of {topology.ranks_per_host} a host"
    largest = max(inventory.tables, key=lambda table: table.rows * table.dim)
    return (
        f"{len(inventory.tables)} tables, {largest.name} of {largest.rows} x {largest.dim} {largest.dtype} "
        f"{largest.optimizer}, {inventory.dense.kind} dense part"
    )

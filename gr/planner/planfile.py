"""A plan as JSON: everything needed to train with it, to report it again and to know what it is for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from gr.config.inventory import SEQUENCE_TYPES, AnyShardingType, InventoryConfig, Kernel, TableConfig
from gr.errors import PlanError
from gr.planner.plan import Placement, Plan, column_blocks
from gr.planner.space import COLUMN_MULTIPLE, COLUMN_TYPES, row_parts
from gr.planner.topology import Topology

FORMAT = "gr-plan-1"
TABLE_IDENTITY = {"name", "rows", "dim", "dtype", "kind", "pooling", "features", "optimizer"}
TOPOLOGY_IDENTITY = ("device", "ranks", "ranks_per_host")


class _Placement(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    table: str
    sharding_type: AnyShardingType
    kernel: Kernel
    ranks: list[int] | Literal["all"]
    column_width: int | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["gr-plan-1"]
    model_hash: str
    topology_hash: str
    bound_seconds: float
    predicted: dict[str, Any] | None = None
    topology: dict[str, Any]
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
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise PlanError(f"{path}: cannot be read: {reason}; write one with `gr plan CONFIG --json {path}`") from error
    return parse_plan(text, str(path))


def parse_plan(text: str, origin: str = "plan") -> Plan:
    """The plan of `dump_plan`, checked: every table is placed once, wholly, on ranks that exist. Raises PlanError."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{origin}: line {error.lineno} is not JSON: {error.msg}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{origin}: not a plan of this version ({FORMAT}); make it again with `gr plan --json`")
    try:
        # Strict JSON, as for configurations: a list is a tuple, text is only text.
        file = _File.model_validate_json(json.dumps(content), strict=True)
        topology = TypeAdapter(Topology).validate_python(file.topology)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(
            f"{origin}: {where}: {first['msg'].lower()}; make the plan again with `gr plan --json`"
        ) from error
    for name, stated, found in (
        ("model_hash", file.model_hash, model_hash(file.inventory)),
        ("topology_hash", file.topology_hash, topology_hash(topology)),
    ):
        if stated != found:
            raise PlanError(
                f"{origin}: {name} says {stated}, its content is {found}: it was edited; make the plan again"
            )
    return Plan(file.inventory, topology, _placements(file, topology, origin), file.bound_seconds)


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
    if table.kind == "sequence" and kind not in SEQUENCE_TYPES:
        return f"{kind} does not exist for sequence tables"
    if table.pooling == "mean" and kind == "grid_shard":
        return "grid_shard computes wrong means"
    if (width is not None) != (kind in COLUMN_TYPES):
        return f"column_width={width} does not go with {kind}"
    if width is not None and (not 0 < width <= table.dim or width % COLUMN_MULTIPLE):
        return f"column_width={width} is not a multiple of {COLUMN_MULTIPLE} up to dim={table.dim}"
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


def check_plan(plan: Plan, inventory: InventoryConfig, topology: Topology) -> None:
    """Raises PlanError where `plan` was made for another model or topology."""
    for what, of_plan, here in (
        ("model", model_hash(plan.inventory), model_hash(inventory)),
        ("topology", topology_hash(plan.topology), topology_hash(topology)),
    ):
        if of_plan != here:
            raise PlanError(
                f"the plan is for another {what}: {of_plan} ({_described(what, plan.inventory, plan.topology)}), and "
                f"this run has {here} ({_described(what, inventory, topology)}); make one with `gr plan CONFIG --json`"
            )


def _described(what: str, inventory: InventoryConfig, topology: Topology) -> str:
    if what == "topology":
        return f"{topology.device}, {topology.ranks} ranks of {topology.ranks_per_host} a host"
    largest = max(inventory.tables, key=lambda table: table.rows * table.dim)
    return (
        f"{len(inventory.tables)} tables, {largest.name} of {largest.rows} x {largest.dim} {largest.dtype} "
        f"{largest.optimizer}, {inventory.dense.kind} dense part"
    )

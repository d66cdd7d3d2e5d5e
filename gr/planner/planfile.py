"""A plan as JSON: all that training with it and reporting it need, and hashes of the model and machine it is for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gr.config.dlrm import ROW_MULTIPLE
from gr.config.inventory import AnyShardingType, InventoryConfig, Kernel, TableConfig
from gr.errors import PlanError
from gr.files import is_transient, parse_json
from gr.planner.enumerate import COLUMN_TYPES, row_parts
from gr.planner.estimate import estimate
from gr.planner.groups import one_group
from gr.planner.placement import Placement, Plan, column_blocks
from gr.planner.topology import Seconds, Topology

FORMAT = "gr-plan-1"
TABLE_IDENTITY = {"name", "rows", "dim", "dtype", "kind", "pooling", "features", "optimizer"}
STATE_IDENTITY = {"state", "state_dtype"}  # left out where they are defaults, as in plans before them
TOPOLOGY_IDENTITY = ("device", "ranks", "ranks_per_host")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    bound_seconds: Seconds
    predicted: dict[str, Any] | None = None
    topology: Topology
    inventory: InventoryConfig
    placements: list[_Placement]


def model_hash(inventory: InventoryConfig) -> str:
    """A hash of the tables and the dense part of a model; batch size and id statistics may change under a plan."""
    tables = [
        table.model_dump(mode="json", include=TABLE_IDENTITY)
        | table.model_dump(mode="json", include=STATE_IDENTITY, exclude_defaults=True)
        for table in inventory.tables
    ]
    return _digest([tables, inventory.dense.model_dump(mode="json")])


def topology_hash(topology: Topology, groups: int = 1) -> str:
    """A hash of device, ranks, ranks per host and groups. A plan stays valid when bandwidths are known better."""
    identity = [getattr(topology, name) for name in TOPOLOGY_IDENTITY]
    return _digest(identity if groups == 1 else [*identity, groups])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def dump_plan(plan: Plan, predicted: Mapping[str, Any] | None = None) -> str:
    """JSON that `parse_plan` reads back to an equal plan. predicted: figures for readers, ignored when read back."""
    everywhere = tuple(range(one_group(plan.inventory, plan.topology)[1].ranks))
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
        "topology_hash": topology_hash(plan.topology, plan.inventory.groups),
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
    try:
        content = parse_json(text)
    except ValueError as error:
        raise PlanError(f"{origin}: {error}; make the plan again with `gr plan --json`") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{origin}: not a plan of this version ({FORMAT}); make it again with `gr plan --json`")
    try:
        # Strict JSON, as for configurations: a list is a tuple, text is only text.
        file = _File.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}." for part in first["loc"])[:-1]
        message = ": ".join(part for part in (origin, where, first["msg"].lower()) if part)
        raise PlanError(f"{message}; make the plan again with `gr plan --json`") from error
    topology = file.topology
    if topology.ranks % topology.ranks_per_host:
        raise PlanError(f"{origin}: {topology.ranks} ranks do not fill hosts of {topology.ranks_per_host}")
    for name, stated, actual in (
        ("model_hash", file.model_hash, model_hash(file.inventory)),
        ("topology_hash", file.topology_hash, topology_hash(topology, file.inventory.groups)),
    ):
        if stated != actual:
            raise PlanError(
                f"{origin}: {name} says {stated}, its content is {actual}: it was edited; make the plan again"
            )
    _, group = one_group(file.inventory, topology)
    return Plan(file.inventory, topology, _placements(file, group, origin), file.bound_seconds)


def _placements(file: _File, topology: Topology, origin: str) -> tuple[Placement, ...]:
    placed: dict[str, _Placement] = {}
    for placement in file.placements:
        if placement.table in placed:
            raise PlanError(f"{origin}: table {placement.table} is placed twice")
        placed[placement.table] = placement
    names = [table.name for table in file.inventory.tables]
    if unknown := sorted(set(placed) - set(names)):
        raise PlanError(f"{origin}: places {unknown[0]}, which is no table of its inventory")
    if missing := [name for name in names if name not in placed]:
        raise PlanError(f"{origin}: has no placement for table {missing[0]}; make the plan again with `gr plan --json`")
    return tuple(_placement(table, placed[table.name], topology, origin) for table in file.inventory.tables)


def _placement(table: TableConfig, written: _Placement, topology: Topology, origin: str) -> Placement:
    ranks = tuple(range(topology.ranks)) if written.ranks == "all" else tuple(written.ranks)
    placement = Placement(table.name, written.sharding_type, written.kernel, ranks, written.column_width)
    if fault := placement_fault(table, placement, topology):
        raise PlanError(f"{origin}: table {table.name}: {fault}")
    return placement


def placement_fault(table: TableConfig, placement: Placement, topology: Topology) -> str | None:
    """The reason why a placement is impossible, or None."""
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
    """("model" or "topology", the plan's, the other): what differs, each as its hash and a description."""
    hashes = [
        ("model", model_hash(plan.inventory), model_hash(inventory)),
        (
            "topology",
            topology_hash(plan.topology, plan.inventory.groups),
            topology_hash(topology, inventory.groups),
        ),
    ]
    return [
        (
            what,
            f"{of_plan} ({_described(what, plan.inventory, plan.topology)})",
            f"{other} ({_described(what, inventory, topology)})",
        )
        for what, of_plan, other in hashes
        if of_plan != other
    ]


def check_plan(plan: Plan, inventory: InventoryConfig, topology: Topology) -> None:
    """Raises PlanError where `plan` was made for another model or topology, or does not fit its own topology."""
    for what, of_plan, of_run in differences(plan, inventory, topology):
        raise PlanError(
            f"the plan is for another {what}: {of_plan}, and this run has {of_run}; make one with "
            "`gr plan CONFIG --json`"
            + (", or let the run make one with planner.replan=true" if what == "topology" else "")
        )
    estimated, own = estimate(plan), plan.topology
    if not estimated.fits:
        rank = int(estimated.total_memory_R.argmax())
        raise PlanError(
            f"the plan does not fit its own topology: rank {rank} needs {estimated.total_memory_R[rank]:.0f} of "
            f"{own.hbm_bytes} bytes, and a rank offloads up to {estimated.host_R.max():.0f} bytes to {own.host_bytes} "
            "of host memory; make one with `gr plan CONFIG --json`"
        )


def _described(what: str, inventory: InventoryConfig, topology: Topology) -> str:
    if what == "topology":
        groups = f" in {inventory.groups} groups" if inventory.groups > 1 else ""
        return f"{topology.device}, {topology.ranks} ranks of {topology.ranks_per_host} a host{groups}"
    largest = max(inventory.tables, key=lambda table: table.rows * table.dim, default=None)
    if largest is None:
        return f"no tables, {inventory.dense.kind} dense part"
    return (
        f"{len(inventory.tables)} tables, {largest.name} of {largest.rows} x {largest.dim} {largest.dtype} "
        f"{largest.optimizer}, {inventory.dense.kind} dense part"
    )

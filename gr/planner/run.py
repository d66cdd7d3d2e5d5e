"""The plan of a training run: read from planner.plan, or made for the machine that the run is on."""

from pathlib import Path

import torch
from torch import nn
from torchrec.distributed.types import ShardingPlan

from gr.config.inventory import SEQUENCE_TYPES, SHARDING_TYPES, InventoryConfig, TableConfig
from gr.config.tree import PlannerConfig, RunConfig
from gr.dist import World
from gr.embeddings.optimizers import FUSED_ON_CPU
from gr.errors import ConfigError, GRError, PlanError
from gr.logging import get_logger
from gr.planner.plan import Plan
from gr.planner.planfile import check_plan, differences, dump_plan, load_plan, parse_plan
from gr.planner.search import search
from gr.planner.sharding_plan import to_sharding_plan
from gr.planner.topology import Topology, parse_topology
from gr.planner.torchrec import torchrec_plan

# torch.cuda.get_device_name() of the boards in hardware.yaml. Their PCIe and NVL variants are other machines.
HARDWARE_BY_GPU = {
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "AMD Instinct MI300X": "mi300x",
}
REFUSED = "refused: "
log = get_logger(__name__)


def make_plan(
    model: nn.Module, inventory: InventoryConfig, config: RunConfig, world: World
) -> tuple[Plan | None, ShardingPlan]:
    """The run's plan, None where TorchRec's planner made it, and what TorchRec makes of it; the same on every rank.

    model: what is to be sharded, may be on meta. Raises ConfigError or PlanError.
    """
    inventory = constrained(inventory, config.planner, world.device.type)
    if config.planner.name == "torchrec":
        local_size, device = world.local_size, world.device
        return None, torchrec_plan(
            model, inventory, config.embeddings, world_size=world.size, local_size=local_size, device=device
        )
    plan = _from_main(config.planner, inventory, world)
    return plan, to_sharding_plan(plan, model, world.device)


def _from_main(planner: PlannerConfig, inventory: InventoryConfig, world: World) -> Plan:
    """The main rank's plan, sent to the others as JSON: they wait for seconds, and the process group for minutes."""
    text = ""
    if world.is_main:
        try:
            text = dump_plan(_plan(planner, inventory, world))
        except GRError as error:
            world.from_main(REFUSED + str(error))
            raise
    text = world.from_main(text)
    if text.startswith(REFUSED):
        raise PlanError(text.removeprefix(REFUSED))
    return parse_plan(text)


def _plan(planner: PlannerConfig, inventory: InventoryConfig, world: World) -> Plan:
    topology = run_topology(planner.topology, world)
    if planner.plan is None:
        return search(inventory, topology)
    plan = load_plan(Path(planner.plan))
    if planner.replan and [what for what, _, _ in differences(plan, inventory, topology)] == ["topology"]:
        log.warning(
            "%s is for %d ranks, and there are %d: making a plan", planner.plan, plan.topology.ranks, world.size
        )
        return search(inventory, topology)
    check_plan(plan, inventory, topology)
    for placement in plan.placements:
        if (wanted := _wanted(planner, placement.table)) not in ("auto", placement.sharding_type):
            raise PlanError(
                f"{planner.plan}: table {placement.table} is {placement.sharding_type} there, and the "
                f"configuration asks for {wanted}: unset planner.sharding and planner.tables, or make another plan"
            )
    return plan


def constrained(inventory: InventoryConfig, planner: PlannerConfig, device: str) -> InventoryConfig:
    """`inventory` with what planner.sharding, planner.tables and the device (cpu or cuda) allow.

    auto allows the sharding types that train the same model: column shards keep row statistics of their own, and
    data-parallel replicas take Adam steps on rows that were not looked up. Raises ConfigError.
    """
    names = [table.name for table in inventory.tables]
    if strangers := sorted(set(planner.tables) - set(names)):
        raise ConfigError(f"planner.tables: no table named {', '.join(strangers)}; the model has {', '.join(names)}")
    tables = [_allowed(table, _wanted(planner, table.name), device) for table in inventory.tables]
    return inventory.model_copy(update={"tables": tuple(tables)})


def _wanted(planner: PlannerConfig, table: str) -> str:
    return planner.tables.get(table, planner.sharding)


def _allowed(table: TableConfig, wanted: str, device: str) -> TableConfig:
    exist = SEQUENCE_TYPES if table.kind == "sequence" else SHARDING_TYPES
    if wanted not in ("auto", *exist):
        raise ConfigError(
            f"planner: {wanted} does not exist for the {table.kind} table {table.name}; use auto, {', '.join(exist)}"
        )
    types = [wanted]
    if wanted == "auto":
        types = ["table_wise", "row_wise", *(["table_row_wise"] if table.kind == "pooled" else [])]
        types += [] if "rowwise" in table.optimizer else ["column_wise"]
        types += [] if "adam" in table.optimizer else ["data_parallel"]
    unfused = device == "cpu" and table.optimizer not in FUSED_ON_CPU
    kernels = ("dense",) if unfused else table.kernels
    return table.model_copy(update={"sharding_types": tuple(types), "kernels": kernels})


def run_topology(described: str | None, world: World) -> Topology:
    """The machine of this run: hardware as `described` (planner.topology) or else detected, ranks and hosts of `world`.

    Raises ConfigError for a GPU that hardware.yaml does not know, PlanError for a wrong description.
    """
    if described is None and world.device.type == "cuda":
        gpu = torch.cuda.get_device_name(world.device)
        described = HARDWARE_BY_GPU.get(gpu)
        if described is None:
            raise ConfigError(
                f"planner.topology is unset and there are no figures for a {gpu!r}: set it to named hardware, or to a "
                "YAML file that `gr calibrate` wrote"
            )
    topology = parse_topology(described or "cpu", {"ranks": world.size, "ranks_per_host": world.local_size})
    if topology.device != world.device.type:
        raise ConfigError(
            f"planner.topology={described} is for {topology.device}, and the run is on {world.device.type}: set "
            "another one, or unset it"
        )
    return topology

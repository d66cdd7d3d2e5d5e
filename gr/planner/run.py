"""The plan of a training run: read from planner.plan, or made for the machine that the run is on."""

from pathlib import Path

import torch
from torch import nn
from torchrec.distributed.types import ShardingPlan

from gr.config.inventory import InventoryConfig, TableConfig
from gr.config.tree import ExperimentConfig
from gr.dist import World
from gr.embeddings.optimizers import FUSED_ON_CPU
from gr.errors import ConfigError, GRError, PlanError
from gr.planner.inventory import experiment_inventory
from gr.planner.plan import Plan
from gr.planner.planfile import check_plan, dump_plan, load_plan, parse_plan
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


def make_plan(
    model: nn.Module, config: ExperimentConfig, item_rows: int, world: World
) -> tuple[Plan | None, ShardingPlan]:
    """The run's plan, None where TorchRec's planner made it, and what TorchRec makes of it; the same on every rank.

    model: what is to be sharded, may be on meta. Raises ConfigError or PlanError.
    """
    inventory = run_inventory(config, item_rows, world.device.type)
    if config.planner.name == "torchrec":
        local_size, device = world.local_size, world.device
        return None, torchrec_plan(
            model, inventory, config.embeddings, world_size=world.size, local_size=local_size, device=device
        )
    plan = _from_main(config, inventory, world)
    return plan, to_sharding_plan(plan, model, world.device)


def _from_main(config: ExperimentConfig, inventory: InventoryConfig, world: World) -> Plan:
    """The main rank's plan, sent to the others as JSON: they wait for seconds, and the process group for minutes."""
    text = ""
    if world.is_main:
        try:
            text = dump_plan(_plan(config, inventory, world))
        except GRError as error:
            world.from_main(REFUSED + str(error))
            raise
    text = world.from_main(text)
    if text.startswith(REFUSED):
        raise PlanError(text.removeprefix(REFUSED))
    return parse_plan(text)


def _plan(config: ExperimentConfig, inventory: InventoryConfig, world: World) -> Plan:
    topology = run_topology(config.planner.topology, world)
    if config.planner.plan is None:
        return search(inventory, topology)
    plan = load_plan(Path(config.planner.plan))
    check_plan(plan, inventory, topology)
    for placement in plan.placements:
        if (wanted := _wanted(config, placement.table)) not in ("auto", placement.sharding_type):
            raise PlanError(
                f"{config.planner.plan}: table {placement.table} is {placement.sharding_type} there, and the "
                f"configuration asks for {wanted}: unset planner.sharding and planner.tables, or make another plan"
            )
    return plan


def run_inventory(config: ExperimentConfig, item_rows: int, device: str) -> InventoryConfig:
    """What the planner counts of an experiment, with what planner.sharding, planner.tables and the device allow.

    device: cpu or cuda. auto allows the sharding types that train the same model: column shards keep row statistics of
    their own, and data-parallel replicas take Adam steps on rows that were not looked up. Raises ConfigError.
    """
    inventory = experiment_inventory(config, item_rows)
    names = [table.name for table in inventory.tables]
    if strangers := sorted(set(config.planner.tables) - set(names)):
        raise ConfigError(f"planner.tables: no table named {', '.join(strangers)}; the model has {', '.join(names)}")
    tables = [_allowed(table, _wanted(config, table.name), device) for table in inventory.tables]
    return inventory.model_copy(update={"tables": tuple(tables)})


def _wanted(config: ExperimentConfig, table: str) -> str:
    return config.planner.tables.get(table, config.planner.sharding)


def _allowed(table: TableConfig, wanted: str, device: str) -> TableConfig:
    types = [wanted]
    if wanted == "auto":
        types = ["table_wise", "row_wise"]
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

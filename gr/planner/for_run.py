"""The plan of a training run: read from planner.plan, or made for the machine that the run is on."""

from pathlib import Path

import torch
from torch import nn
from torchrec.distributed.types import ShardingPlan

from gr.config.inventory import InventoryConfig
from gr.config.planner import PlannerConfig
from gr.config.run import RunConfig
from gr.dist import World
from gr.errors import ConfigError, GRError, PlanError
from gr.logging import get_logger
from gr.planner.constraints import check_state, constrained, sharding_type_of
from gr.planner.placement import Plan
from gr.planner.plan import search
from gr.planner.planfile import check_plan, differences, dump_plan, load_plan, parse_plan
from gr.planner.sharding_plan import to_sharding_plan
from gr.planner.topology import Topology, hardware_of_gpu, parse_topology

REFUSED = "refused: "
log = get_logger(__name__)


def make_plan(
    model: nn.Module, inventory: InventoryConfig, config: RunConfig, world: World
) -> tuple[Plan, ShardingPlan]:
    """The run's plan, the same on every rank, and the ShardingPlan of this rank's group.

    model: the model whose tables are to be sharded; it may be on meta. Raises ConfigError or PlanError.
    """
    plan = _from_main(config.planner, constrained(inventory, config.planner, world.device.type), world)
    return plan, to_sharding_plan(plan, model, world.device, world.rank)


def _from_main(planner: PlannerConfig, inventory: InventoryConfig, world: World) -> Plan:
    """The plan of the main rank, sent to the others as JSON: they wait seconds, a process group minutes."""
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
    tables = {table.name: table for table in inventory.tables}
    for placement in plan.placements:
        check_state(planner, tables[placement.table], placement.sharding_type)
        if (chosen := sharding_type_of(planner, placement.table)) not in ("auto", placement.sharding_type):
            raise PlanError(
                f"{planner.plan}: table {placement.table} is {placement.sharding_type} there, and the "
                f"configuration asks for {chosen}: unset planner.sharding and planner.tables, or make another plan"
            )
    return plan


def run_topology(described: str | None, world: World) -> Topology:
    """The machine of this run: hardware as `described` (planner.topology) or detected, ranks and hosts of `world`.

    Raises ConfigError for a GPU that hardware.yaml does not know, PlanError for a wrong description.
    """
    if described is None and world.device.type == "cuda":
        gpu = torch.cuda.get_device_name(world.device)
        described = hardware_of_gpu(gpu)
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

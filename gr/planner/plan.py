"""The plan of an inventory on a topology: enumerated options -> solver -> placements."""

from gr.config.inventory import SHARDING_TYPES, InventoryConfig
from gr.config.towers import check_split
from gr.errors import PlanError
from gr.planner.candidates import Capacity
from gr.planner.enumerate import KERNELS, search_space
from gr.planner.groups import one_group
from gr.planner.memory import fixed_memory
from gr.planner.placement import Placement, Plan
from gr.planner.solve import DoesNotFit, solve_balanced
from gr.planner.topology import Topology
from gr.units import size


def search(inventory: InventoryConfig, topology: Topology) -> Plan:
    """The best plan of the solver, with a lower bound on the cost of any. Equal inputs give equal plans.

    Raises DoesNotFit (a PlanError) where memory does not suffice, PlanError where constraints exclude one another.
    """
    own, group = one_group(inventory, topology)
    _check_ranks(own, group)
    if not inventory.tables:  # a model of its dense part alone
        table_capacity(inventory, topology)
        return Plan(inventory, topology, (), 0.0)
    options = search_space(inventory, topology)
    solution = solve_balanced(options, table_capacity(inventory, topology))
    placements = tuple(
        Placement(
            table=table.name,
            sharding_type=SHARDING_TYPES[options.sharding_type_O[option]],
            kernel=KERNELS[options.kernel_O[option]],
            ranks=tuple(ranks.tolist()),
            column_width=int(options.column_width_O[option]) or None,
        )
        for table, option, ranks in zip(inventory.tables, solution.option_T, solution.ranks_T, strict=True)
    )
    return Plan(inventory, topology, placements, solution.bound_seconds)


def table_capacity(inventory: InventoryConfig, topology: Topology) -> Capacity:
    """The memory left for table shards on each rank. Raises DoesNotFit where the rest alone is too large."""
    fixed = fixed_memory(inventory, topology)
    left = topology.hbm_bytes - sum(fixed.values())
    if left <= 0:
        largest = max(fixed, key=lambda kind: fixed[kind])
        raise DoesNotFit(
            f"without any table a rank needs {size(sum(fixed.values()))} of {size(topology.hbm_bytes)}, "
            f"most of it {largest} ({size(fixed[largest])}); "
            + ("dense.strategy=fsdp shares it" if largest.startswith("dense") else "lower the batch size")
        )
    _, group = one_group(inventory, topology)
    return Capacity(group.ranks, group.ranks_per_host, left, topology.host_bytes)


def _check_ranks(inventory: InventoryConfig, topology: Topology) -> None:
    if not inventory.dense_lies_on(topology.ranks):
        raise PlanError(
            f"dense_parallel={inventory.dense_parallel} with tensor_parallel={inventory.tensor_parallel} cannot lie on "
            f"{topology.ranks} ranks: tensor_parallel divides them, ddp has one such group, and fsdp takes 2 ranks"
        )
    if inventory.tensor_parallel > 1:
        check_split(getattr(inventory.dense, "tower", None), inventory.tensor_parallel)
    for table in inventory.tables:
        if table.ranks is not None and (wrong := [rank for rank in table.ranks if rank >= topology.ranks]):
            raise PlanError(
                f"table {table.name}: ranks names {wrong[0]}, but {topology.name} has ranks 0 to {topology.ranks - 1}"
            )

"""Groups of ranks: each has a copy of the tables, sharded over its ranks alone, and the copies are averaged (2D).

A group is `ranks / groups` neighbouring ranks, so its all-to-alls have fewer peers and cross fewer hosts.
"""

from dataclasses import replace

from gr.config.inventory import InventoryConfig
from gr.errors import PlanError
from gr.planner.topology import Topology, with_ranks


def one_group(inventory: InventoryConfig, topology: Topology) -> tuple[InventoryConfig, Topology]:
    """The tables of a group as a job of its own: its ranks, each with the batch that it has among all ranks.

    Raises PlanError unless groups are equal parts of hosts, or whole hosts.
    """
    groups, local = inventory.groups, topology.ranks_per_host
    if groups == 1:
        return inventory, topology
    size, left = divmod(topology.ranks, groups)
    if left or size < 1 or (size % local and local % size):
        raise PlanError(
            f"groups={groups} of {topology.ranks} ranks, {local} a host: a group is an equal part of a host, or whole "
            "hosts; set another number of groups (planner.groups)"
        )
    update = {"rank_batch_size": inventory.batch_on(topology.ranks), "global_batch_size": None, "groups": 1}
    return inventory.model_copy(update=update), with_ranks(topology, size)


def copies(inventory: InventoryConfig, topology: Topology) -> Topology:
    """The ranks that hold the same shards, one of each group, as a machine of their own."""
    size = topology.ranks // inventory.groups
    return replace(topology, ranks=inventory.groups, ranks_per_host=max(1, topology.ranks_per_host // size))

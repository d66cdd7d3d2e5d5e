"""TorchRec's own planner on the tables of an experiment, beside gr's: sharding type, kernel and ranks of every table.

    python -m benchmarks.torchrec_planner CONFIG [KEY=VALUE ...] --topology h100x8

Both planners get the same inventory and constraints, and neither allocates a table. benchmarks/planner.py compares
their costs on lists of tables.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Topology
from torchrec.distributed.types import ParameterSharding, ShardingPlan

from gr.config import load_config
from gr.config.inventory import InventoryConfig, TableConfig
from gr.config.optim import TableOptimizerConfig
from gr.config.run import EmbeddingsConfig
from gr.errors import PlanError
from gr.models import build_model
from gr.parallel.tables import pooled_sharder, sequence_sharder
from gr.planner.constraints import constrained
from gr.planner.plan import search
from gr.planner.sharding_plan import to_sharding_plan
from gr.planner.topology import parse_topology

RESERVED_FRACTION = 0.15


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torchrec_planner")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--topology", required=True, metavar="NAMExRANKS")
    given = parser.parse_args(arguments)
    config, topology = load_config(given.config, given.overrides), parse_topology(given.topology)
    schema, device = config.load_schema(), torch.device(topology.device)
    model = build_model(config, schema)
    inventory = constrained(config.inventory(schema), config.planner, topology.device)
    plans = {
        "gr": to_sharding_plan(search(inventory, topology), model, device),
        "TorchRec": torchrec_plan(
            model,
            inventory,
            config.embeddings,
            world_size=topology.ranks,
            local_size=topology.ranks_per_host,
            device=device,
        ),
    }
    for planner, plan in plans.items():
        for path, module in plan.plan.items():
            for table, sharding in module.items():
                print(f"{planner:10s} {path}.{table:30s} {described(sharding)}")


def torchrec_plan(
    model: nn.Module,
    inventory: InventoryConfig,
    embeddings: EmbeddingsConfig,
    *,
    world_size: int,
    local_size: int,
    device: torch.device,
) -> ShardingPlan:
    """TorchRec's plan for the tables of `model`, which may be on meta; the same on every rank.

    Needs no process group. Raises PlanError where TorchRec has no plan.
    """
    batch_size = inventory.batch_on(world_size)
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, local_world_size=local_size, compute_device=device.type),
        batch_size=batch_size,
        constraints={table.name: _constraints(table, batch_size) for table in inventory.tables},
        storage_reservation=FixedPercentageStorageReservation(RESERVED_FRACTION),
    )
    try:
        plan = planner.plan(model, [sequence_sharder(embeddings), pooled_sharder(embeddings)])
    except Exception as error:  # TorchRec raises several unrelated types for an infeasible plan
        raise PlanError(f"TorchRec's planner found no plan for {world_size} ranks: {error}") from error
    for sharding in (sharding for module in plan.plan.values() for sharding in module.values()):
        sharding.compute_kernel = _kernel(embeddings.optimizer, device, sharding.sharding_type)
    return plan


def described(sharding: ParameterSharding) -> str:
    """A line like `row_wise fused on 8 ranks from 0`."""
    ranks = sharding.ranks or []
    return f"{sharding.sharding_type} {sharding.compute_kernel} on {len(ranks)} ranks from {min(ranks, default=0)}"


def _kernel(optimizer: TableOptimizerConfig, device: torch.device, sharding_type: str) -> str:
    """The kernel that gr runs. TorchRec's planner knows no dense kernel for most types, but TorchRec runs them."""
    dense = sharding_type == "data_parallel" or (device.type == "cpu" and not optimizer.fused_on_cpu)
    return "dense" if dense else "fused"


def _constraints(table: TableConfig, batch_size: int) -> ParameterConstraints:
    ids_per_example = table.ids_per_example + table.ids_per_step / batch_size
    return ParameterConstraints(
        sharding_types=list(table.sharding_types or ()),
        # dense is for data_parallel alone: TorchRec takes fused where it can have both.
        compute_kernels=["fused", "dense"],
        # TorchRec's default pooling factor of 1 would cost a whole history as one id.
        pooling_factors=[ids_per_example / table.features] * table.features,
    )


if __name__ == "__main__":
    main(sys.argv[1:])

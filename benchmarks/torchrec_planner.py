"""Sharding plans from TorchRec's own planner (planner.name=torchrec), to compare ours with."""

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Topology
from torchrec.distributed.types import ShardingPlan

from gr.config.inventory import InventoryConfig, TableConfig
from gr.config.run import EmbeddingsConfig
from gr.embeddings.optimizers import compute_kernel
from gr.errors import PlanError
from gr.parallel.tables import pooled_sharder, sequence_sharder

RESERVED_FRACTION = 0.15


def torchrec_plan(
    model: nn.Module,
    inventory: InventoryConfig,
    embeddings: EmbeddingsConfig,
    *,
    world_size: int,
    local_size: int,
    device: torch.device,
) -> ShardingPlan:
    """TorchRec's plan for the tables of `model`, which may be on meta. Needs no process group.

    A pure function: every rank makes its own, and none is sent around. Raises PlanError where it finds none.
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
        sharding.compute_kernel = compute_kernel(embeddings.optimizer, device, sharding.sharding_type)
    return plan


def _constraints(table: TableConfig, batch_size: int) -> ParameterConstraints:
    ids_per_example = table.ids_per_example + table.ids_per_step / batch_size
    return ParameterConstraints(
        sharding_types=list(table.sharding_types or ()),
        # dense for data_parallel alone: TorchRec takes fused where it can have both. See torchrec_plan for the others.
        compute_kernels=["fused", "dense"],
        # Without it the planner costs a whole history as one id (its default pooling factor is 1).
        pooling_factors=[ids_per_example / table.features] * table.features,
    )

"""Sharding plans from TorchRec's planner, or of the one sharding type that the configuration asks for.

A plan is a pure function of (model, configuration, world size): every rank makes its own, and none is sent around.
"""

from collections.abc import Callable

import torch
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Topology
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from gr.config.tree import ExperimentConfig
from gr.embeddings.collection import ROW_MULTIPLE
from gr.embeddings.optimizers import compute_kernel
from gr.embeddings.sharding import sequence_sharder
from gr.errors import ConfigError, PlanError

# Sequence tables have no node-local types: TorchRec's EmbeddingCollection knows these four only.
AUTO_TYPES = ["table_wise", "row_wise", "column_wise"]
RESERVED_FRACTION = 0.15


def make_plan(
    model: nn.Module, config: ExperimentConfig, *, world_size: int, local_size: int, device: torch.device
) -> ShardingPlan:
    """A plan for every EmbeddingCollection of `model`, which may be on meta. Needs no process group.

    Raises ConfigError for a table that planner.tables names and the model has not, PlanError where TorchRec's planner
    finds no plan.
    """
    plan: dict[str, EmbeddingModuleShardingPlan] = {}
    collections = {name: m for name, m in model.named_modules() if isinstance(m, EmbeddingCollection)}
    tables = [table.name for m in collections.values() for table in m.embedding_configs()]
    if strangers := sorted(set(config.planner.tables) - set(tables)):
        raise ConfigError(f"planner.tables: no table named {', '.join(strangers)}; the model has {', '.join(tables)}")
    if config.planner.sharding == "auto" and world_size > 1 and set(tables) != set(config.planner.tables):
        return _searched(model, config, world_size=world_size, local_size=local_size, device=device)
    for name, collection in collections.items():
        plan[name] = _prescribed(collection, config, world_size=world_size, local_size=local_size, device=device)
    return ShardingPlan(plan)


def _prescribed(
    collection: EmbeddingCollection,
    config: ExperimentConfig,
    *,
    world_size: int,
    local_size: int,
    device: torch.device,
) -> EmbeddingModuleShardingPlan:
    default = "table_wise" if config.planner.sharding == "auto" else config.planner.sharding
    tables = collection.embedding_configs()
    types = {table.name: config.planner.tables.get(table.name, default) for table in tables}
    plan = construct_module_sharding_plan(
        collection,
        {
            table.name: _generator(types[table.name], index, table.embedding_dim, world_size)
            for index, table in enumerate(tables)
        },
        sharder=sequence_sharder(config.embeddings),
        local_size=local_size,
        world_size=world_size,
        device_type=device.type,
    )
    for name, sharding in plan.items():
        sharding.compute_kernel = compute_kernel(config.embeddings.optimizer, device, types[name])
    return plan


def _generator(sharding_type: str, index: int, dim: int, world_size: int) -> Callable:
    match sharding_type:
        case "table_wise":
            return table_wise(rank=index % world_size)
        case "row_wise":
            return row_wise()
        case "data_parallel":
            return data_parallel()
        case _:
            blocks = dim // ROW_MULTIPLE
            shards = max(n for n in range(1, world_size + 1) if blocks % n == 0)
            return column_wise(ranks=list(range(shards)))


def _searched(
    model: nn.Module, config: ExperimentConfig, *, world_size: int, local_size: int, device: torch.device
) -> ShardingPlan:
    rank_batch_size = config.trainer.global_batch_size // world_size
    constraints = {}
    for module in model.modules():
        if not isinstance(module, EmbeddingCollection):
            continue
        for table in module.embedding_configs():
            wanted = config.planner.tables.get(table.name)
            types = [wanted] if wanted else AUTO_TYPES
            constraints[table.name] = ParameterConstraints(
                sharding_types=types,
                # TorchRec lists no dense kernel for these types, though it runs them: see below.
                compute_kernels=["dense" if wanted == "data_parallel" else "fused"],
                # Without it the planner costs a whole history as one id (its default pooling factor is 1).
                pooling_factors=[float(config.data.max_length)] * len(table.feature_names),
            )
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, local_world_size=local_size, compute_device=device.type),
        batch_size=rank_batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED_FRACTION),
    )
    try:
        plan = planner.plan(model, [sequence_sharder(config.embeddings)])
    except Exception as error:  # TorchRec raises several unrelated types for an infeasible plan
        raise PlanError(f"TorchRec's planner found no plan for {world_size} ranks: {error}") from error
    for sharding in (sharding for module in plan.plan.values() for sharding in module.values()):
        sharding.compute_kernel = compute_kernel(config.embeddings.optimizer, device, sharding.sharding_type)
    return plan

"""A plan as TorchRec's ShardingPlan, which DistributedModelParallel applies."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from gr.config.inventory import TableConfig
from gr.errors import PlanError
from gr.planner.groups import one_group
from gr.planner.placement import Placement, Plan, column_blocks, shards


def to_sharding_plan(plan: Plan, model: nn.Module, device: torch.device, rank: int = 0) -> ShardingPlan:
    """The ShardingPlan of `plan` for the collections of `model`, which may be on meta, with tables on `device`.

    rank: of the process, whose group it is for.
    Raises PlanError where the tables of the plan are not the model's, or TorchRec cannot run it on the device.
    """
    homes = _homes(model)
    tables = {table.name: table for table in plan.inventory.tables}
    placements = {placement.table: placement for placement in plan.placements}
    _check_names(list(homes), placements)
    _check_column_blocks(homes, tables, placements)
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    size = one_group(plan.inventory, plan.topology)[1].ranks
    first = rank // size * size
    for name, home in homes.items():
        table = tables[name]
        if (table.kind, table.rows, table.dim) != home[1:]:
            raise PlanError(
                f"table {name} of the plan is {table.kind}, {table.rows} x {table.dim}; the model's is {home.kind}, "
                f"{home.rows} x {home.dim}: make a plan for this model with `gr plan`"
            )
        placement = placements[name]
        placement = replace(placement, ranks=tuple(first + rank for rank in placement.ranks))
        sharding = _parameter_sharding(table, placement, plan.topology.ranks_per_host, device)
        modules.setdefault(home.path, EmbeddingModuleShardingPlan())[name] = sharding
    return ShardingPlan(dict(modules))


class _Home(NamedTuple):
    """A table of the model. path: of its collection."""

    path: str
    kind: str
    rows: int
    dim: int


def _homes(model: nn.Module) -> dict[str, _Home]:
    homes = {}
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingCollection):
            kind, configs = "sequence", module.embedding_configs()
        elif isinstance(module, EmbeddingBagCollection):
            kind, configs = "pooled", module.embedding_bag_configs()
        else:
            continue
        for table in configs:
            homes[table.name] = _Home(path, kind, table.num_embeddings, table.embedding_dim)
    return homes


def _check_names(of_model: list[str], of_plan: dict[str, Placement]) -> None:
    faults = []
    if missing := [name for name in of_model if name not in of_plan]:
        faults.append(f"the model's {_listed(missing)} not in the plan")
    if unknown := [name for name in of_plan if name not in of_model]:
        faults.append(f"the plan's {_listed(unknown)} not in the model")
    if faults:
        raise PlanError(f"{', '.join(faults)}: make a plan for this model with `gr plan`")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"table {shown} is" if len(names) == 1 else f"tables {shown} are"


def _check_column_blocks(
    homes: Mapping[str, _Home], tables: Mapping[str, TableConfig], placements: Mapping[str, Placement]
) -> None:
    """Refuses unequal column blocks: ShardedEmbeddingCollection sends those of all its tables as rows of one width."""
    first: dict[str, tuple[str, int]] = {}
    for name, home in homes.items():
        if home.kind == "pooled" or placements[name].sharding_type != "column_wise":
            continue
        for width in column_blocks(tables[name].dim, placements[name].column_width):
            other, other_width = first.setdefault(home.path, (name, width))
            if width != other_width:
                raise PlanError(
                    f"{home.path}: column blocks of {other_width} (table {other}) and {width} columns (table {name}); "
                    "one EmbeddingCollection takes one width: let one of them be row_wise or table_wise"
                )


def _parameter_sharding(
    table: TableConfig, placement: Placement, ranks_per_host: int, device: torch.device
) -> ParameterSharding:
    _check_kernel(table, placement, device)
    if placement.sharding_type == "data_parallel":
        return ParameterSharding(placement.sharding_type, "dense", list(placement.ranks))
    cached = placement.kernel == "fused_uvm_caching"
    rectangles = [
        ShardMetadata(
            shard_offsets=[shard.row, shard.column],
            shard_sizes=[shard.rows, shard.columns],
            placement=_device_of(shard.rank, ranks_per_host, device),
        )
        for shard in shards(table, placement)
    ]
    return ParameterSharding(
        placement.sharding_type,
        placement.kernel,
        list(placement.ranks),
        EnumerableShardingSpec(rectangles),
        cache_params=CacheParams(load_factor=table.cache_load_factor) if cached else None,
    )


def _check_kernel(table: TableConfig, placement: Placement, device: torch.device) -> None:
    fused_on_cpu = placement.kernel == "fused" and table.is_fused_on_cpu()
    # TorchRec would run the host-memory kernels as fused and say nothing, and fail on Adam in an assertion.
    if device.type == "cpu" and not fused_on_cpu and placement.kernel != "dense":
        raise PlanError(
            f"table {table.name}: no kernel {placement.kernel} with {table.optimizer}, {table.dtype} and "
            f"rounding={table.rounding} on cpu; make a plan for a cpu topology, or set kernels=[dense]"
        )


def _device_of(rank: int, ranks_per_host: int, device: torch.device) -> str:
    return f"rank:{rank}/cpu" if device.type == "cpu" else f"rank:{rank}/{device.type}:{rank % ranks_per_host}"

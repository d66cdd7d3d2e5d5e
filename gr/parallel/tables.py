"""Applies a sharding plan: a single-device model on meta becomes a DistributedModelParallel on this rank's device."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, PoolingType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from gr import compat
from gr.config.features import ComputeKernel
from gr.config.inventory import FUSED_KERNELS, SHARDING_TYPES, CommDtype, kernels_of, sharding_types_of
from gr.config.planner import PlannerConfig
from gr.config.run import EmbeddingsConfig
from gr.embeddings import table_weights
from gr.embeddings.index_dedup import have_index_dedup_on_cpu
from gr.embeddings.local_shards import local_shards, take_lookups
from gr.embeddings.optimizers import fused_params
from gr.errors import PlanError
from gr.ops.huge_pages import take_huge_pages
from gr.parallel.communication import codecs
from gr.parallel.dense import PlainDataParallel
from gr.parallel.groups import sharding_env

FP32 = CommDtype()


def sequence_sharder(
    config: EmbeddingsConfig, comm_dtype: CommDtype = FP32, *, index_dedup: bool = False
) -> EmbeddingCollectionSharder:
    """The sharder of the sequence tables, which also carries the fused optimizer of those without one of their own."""
    return EmbeddingCollectionSharder(fused_params(config.optimizer), codecs(comm_dtype), index_dedup)


class PooledSharder(EmbeddingBagCollectionSharder):
    """Computes right means, and offers every sharding type: the base class has none by rows on CPU, where they run."""

    def shard(self, *args: Any, **named: Any) -> ShardedEmbeddingBagCollection:
        sharded = super().shard(*args, **named)
        compat.divide_only_row_shards(sharded)
        return sharded

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


def pooled_sharder(config: EmbeddingsConfig, comm_dtype: CommDtype = FP32) -> PooledSharder:
    """The sharder of the pooled tables, which also carries the fused optimizer of those without one of their own."""
    return PooledSharder(fused_params(config.optimizer), codecs(comm_dtype))


def shard_tables(
    model: nn.Module,
    plan: ShardingPlan,
    config: EmbeddingsConfig,
    device: torch.device,
    planner: PlannerConfig | None = None,
) -> DistributedModelParallel:
    """Shards the tables by `plan`, with storage on `device`; the dense part stays as it is, see parallelise_dense.

    planner: its groups, types of communication and index dedup; None: one group, fp32, as PlannerConfig has it. The
    weights are still to be filled (see initialise_tables). Raises, on every rank, PlanError for a sharding type that is
    not valid for its table or for the type it is sent in, and on CPU for a fused shard without rows; ConfigError for
    dynamic ids under fused_uvm_caching.
    """
    planner = planner or PlannerConfig()
    _refuse_invalid_types(model, plan, planner.comm_dtype)
    _refuse_cached_ids(model, plan, config)
    if device.type == "cpu":
        _refuse_shards_without_rows(model, plan)
    compat.quiet_known_warnings()
    env = sharding_env(planner.groups, device)
    # A rank alone sends nothing.
    comm_dtype, index_dedup = (planner.comm_dtype, planner.index_dedup) if env.world_size > 1 else (FP32, False)
    if index_dedup and device.type == "cpu":
        have_index_dedup_on_cpu()
    shared = fused_params(config.optimizer)
    for table, weight in table_weights(model).items():
        if (own := fused_params(config.optimizer_of(table), config.rounding_of(table))) != shared:
            weight._optimizer_kwargs = [own]  # type: ignore[attr-defined]  # where TorchRec looks for it
    sharded = DistributedModelParallel(
        model,
        env=env,
        device=device,
        plan=plan,
        sharders=[
            sequence_sharder(config, comm_dtype, index_dedup=index_dedup),
            pooled_sharder(config, comm_dtype),
        ],
        init_data_parallel=False,
        init_parameters=False,
        data_parallel_wrapper=PlainDataParallel(),
    )
    take_lookups(sharded)
    for shard in local_shards(sharded):
        for tensor in (shard.weight, *shard.states.values()):
            take_huge_pages(tensor)
    return sharded


def _sharded(model: nn.Module, plan: ShardingPlan) -> Iterator[tuple[str, BaseEmbeddingConfig, ParameterSharding]]:
    """(path of its collection, table, how it is sharded) of every table in the plan."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingCollection):
            tables = module.embedding_configs()
        elif isinstance(module, EmbeddingBagCollection):
            tables = module.embedding_bag_configs()
        else:
            continue
        shardings = plan.get_plan_for_module(path) or {}
        yield from ((path, table, shardings[table.name]) for table in tables if table.name in shardings)


def _refuse_invalid_types(model: nn.Module, plan: ShardingPlan, comm_dtype: CommDtype) -> None:
    for _, table, sharding in _sharded(model, plan):
        pooling = getattr(table, "pooling", None)
        kind = "sequence" if pooling is None else "pooled"
        valid = sharding_types_of(kind, "mean" if pooling == PoolingType.MEAN else "sum")
        if sharding.sharding_type not in valid:
            raise PlanError(
                f"table {table.name}: {sharding.sharding_type} is not valid for a {kind} table"
                f"{' of means' if pooling == PoolingType.MEAN else ''} in torchrec 1.8; use {', '.join(valid)}"
            )
        for width in _shard_widths(table, sharding):
            if fault := comm_dtype.fault(kind, sharding.sharding_type, width):
                raise PlanError(f"table {table.name}: {fault} (planner.comm_dtype)")


def _shard_widths(table: BaseEmbeddingConfig, sharding: ParameterSharding) -> set[int]:
    """Columns of the shards of a table."""
    if isinstance(sharding.sharding_spec, EnumerableShardingSpec):
        return {shard.shard_sizes[1] for shard in sharding.sharding_spec.shards}
    return {table.embedding_dim}


def _refuse_cached_ids(model: nn.Module, plan: ShardingPlan, config: EmbeddingsConfig) -> None:
    for _, table, sharding in _sharded(model, plan):
        kernel = sharding.compute_kernel
        if kernel in FUSED_KERNELS:
            kernels_of(table.name, config.ids_of(table.name), cast(ComputeKernel, kernel))


def _refuse_shards_without_rows(model: nn.Module, plan: ShardingPlan) -> None:
    """fbgemm's fused CPU kernels read past their tables where one has no rows, or look for a GPU where none has any."""
    for _, table, sharding in _sharded(model, plan):
        if sharding.compute_kernel != "fused" or not isinstance(sharding.sharding_spec, EnumerableShardingSpec):
            continue
        for shard in sharding.sharding_spec.shards:
            if not shard.shard_sizes[0]:
                raise PlanError(
                    f"table {table.name}: {sharding.sharding_type} leaves rank {shard.placement.rank()} without a row, "
                    "which fbgemm's fused kernels cannot have on cpu; let it be table_wise or data_parallel "
                    f"(planner.tables.{table.name}=table_wise)"
                )

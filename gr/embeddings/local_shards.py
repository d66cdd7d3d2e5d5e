"""The local shards of every table under DistributedModelParallel, whatever the sharding type and kernel."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbedding,
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
)
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingEnv2D

from gr.embeddings.fused_lookup import take_lookup
from gr.embeddings.row_gradients import LocalRows, ReplicatedRows

# TorchRec's kernel classes share an interface but no public base.
FusedKernel: TypeAlias = BatchedFusedEmbedding | BatchedFusedEmbeddingBag
PooledKernel: TypeAlias = BatchedFusedEmbeddingBag | BatchedDenseEmbeddingBag
Kernel: TypeAlias = FusedKernel | PooledKernel | BatchedDenseEmbedding


@dataclass(frozen=True)
class TableShard:
    """One rectangle of one table, held by this rank.

    table: name. shape: (rows, columns) of the whole table. weight: [r, c], a view of the kernel's storage.
    row_offset, column_offset: where the rectangle starts in the table. column_widths: of the blocks that the table's
    columns are cut into, and column_block which of them this is. replicated: every rank holds the same one.
    states: the fused optimizer's states by name, views [r, c], or [r] for row-wise ones; empty for a dense kernel.
    kernel: the TorchRec kernel that holds it. index: which of the kernel's shards it is. gradients: of a dense kernel,
    for TableOptimizer; None where the kernel updates the shard in backward. group: the ranks that share the table.
    """

    table: str
    shape: tuple[int, int]
    weight: Tensor
    row_offset: int
    column_offset: int
    column_widths: tuple[int, ...]
    column_block: int
    replicated: bool
    states: dict[str, Tensor]
    kernel: Kernel
    index: int
    gradients: LocalRows | ReplicatedRows | None
    group: dist.ProcessGroup

    @property
    def is_fused(self) -> bool:
        """True where the kernel updates the shard in backward; elsewhere its gradient is left for TableOptimizer."""
        return self.gradients is None

    @property
    def is_pooled(self) -> bool:
        """True for a table of an EmbeddingBagCollection."""
        return isinstance(self.kernel, PooledKernel)


def local_shards(model: nn.Module) -> Iterator[TableShard]:
    """Every table shard of this rank, in the order of the modules."""
    for kernel, group in _kernels(model):
        states, gradients = _fused_states(kernel), _gradients(kernel)
        weights: list[Tensor] = kernel.split_embedding_weights()
        tables = kernel.config.embedding_tables
        for index, (table, weight, state) in enumerate(zip(tables, weights, states, strict=True)):
            row, column = table.local_metadata.shard_offsets if table.local_metadata else (0, 0)
            blocks = _column_blocks(table)
            yield TableShard(
                table=table.name,
                shape=(table.num_embeddings, table.embedding_dim),
                weight=weight,
                row_offset=row,
                column_offset=column,
                column_widths=tuple(blocks.values()),
                column_block=list(blocks).index(column),
                replicated=table.local_metadata is None,
                states=state,
                kernel=kernel,
                index=index,
                gradients=gradients,
                group=group,
            )


def _kernels(model: nn.Module) -> Iterator[tuple[Kernel, dist.ProcessGroup]]:
    """Every kernel, with the ranks that its collection is sharded over."""
    for collection in model.modules():
        if isinstance(collection, ShardedEmbeddingCollection | ShardedEmbeddingBagCollection):
            env = collection._env
            group = env.sharding_pg if isinstance(env, ShardingEnv2D) else env.process_group
            yield from ((kernel, group) for kernel in kernels_of(collection))


def kernels_of(collection: ShardedEmbeddingCollection | ShardedEmbeddingBagCollection) -> Iterator[Kernel]:
    """The kernels of a sharded collection. TorchRec keeps the lookups in a list, out of sight of modules()."""
    for lookup in collection._lookups:
        yield from (module for module in lookup.modules() if isinstance(module, Kernel))


def take_lookups(model: nn.Module) -> None:
    """Has the kernels of a model that was just sharded look up as gr.embeddings says: the dense ones as row_gradients,
    the fused ones as fused_lookup.
    """
    for kernel, _ in _kernels(model):
        if isinstance(kernel, FusedKernel):
            take_lookup(kernel.emb_module)
        else:
            replicated = kernel.config.embedding_tables[0].local_metadata is None
            kernel.row_gradients = (ReplicatedRows if replicated else LocalRows)(kernel.emb_module)


def _gradients(kernel: Kernel) -> LocalRows | ReplicatedRows | None:
    return None if isinstance(kernel, FusedKernel) else kernel.row_gradients


def _column_blocks(table: ShardedEmbeddingTable) -> dict[int, int]:
    """Width by first column, in the order of the columns."""
    if table.global_metadata is None:
        return {0: table.embedding_dim}
    return dict(sorted({(m.shard_offsets[1], m.shard_sizes[1]) for m in table.global_metadata.shards_metadata}))


def _fused_states(kernel: Kernel) -> list[dict[str, Tensor]]:
    tbe = kernel.emb_module
    if not isinstance(kernel, FusedKernel) or tbe.optimizer == EmbOptimType.EXACT_SGD:
        return [{} for _ in kernel.config.embedding_tables]
    return [dict(state) for state in tbe.get_optimizer_state()]

"""The local shards of every table under DistributedModelParallel, whatever the sharding type and kernel."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

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
    kernel: the TorchRec kernel that holds it. index: which of the kernel's shards it is.
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

    @property
    def is_fused(self) -> bool:
        """True where the kernel updates the shard in backward; elsewhere its gradient is left for TableOptimizer."""
        return isinstance(self.kernel, FusedKernel)

    @property
    def is_pooled(self) -> bool:
        """True for a table of an EmbeddingBagCollection."""
        return isinstance(self.kernel, PooledKernel)

    def gradient(self) -> Tensor | None:
        """Gradient [r, c] of a dense kernel's shard, or None where backward has left none."""
        dense = self.kernel.emb_module
        if dense.weights.grad is None:
            return None
        start = dense.weights_physical_offsets[self.index]
        return dense.weights.grad[start : start + self.weight.numel()].view_as(self.weight)


def local_shards(model: nn.Module) -> Iterator[TableShard]:
    """Every table shard of this rank, in the order of the modules."""
    for kernel in _kernels(model):
        states = _fused_states(kernel)
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
            )


def _kernels(model: nn.Module) -> Iterator[Kernel]:
    for collection in model.modules():
        if isinstance(collection, ShardedEmbeddingCollection | ShardedEmbeddingBagCollection):
            # TorchRec keeps the lookups in a list, out of sight of modules().
            for lookup in collection._lookups:
                yield from (m for m in lookup.modules() if isinstance(m, Kernel))


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

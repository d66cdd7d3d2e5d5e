"""Table weights and optimizer states as ShardedTensors, so that DCP can load them under any other plan.

A row-wise state (one number a row) is saved as [rows, C], C being the number of column blocks: under column-wise
sharding every block keeps its own. It is linear in the mean of squared gradients over the block's columns, so loading
into other blocks takes means weighted by the columns shared, which is exact wherever blocks are joined.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from gr.embeddings.local_shards import TableShard

WEIGHT = "weight"


@dataclass(frozen=True)
class TableEntry:
    """One saved tensor of one table, `<table>.weight` or `<table>.<state>`.

    value: what DCP saves and loads in place. shards: this rank's parts of it. column_widths: of the table's column
    blocks, in order.
    """

    name: str
    is_rowwise: bool
    column_widths: tuple[int, ...]
    value: ShardedTensor | Tensor
    shards: tuple[tuple[TableShard, Tensor], ...]

    def fill_rowwise(self, saved: Tensor, widths: Sequence[int]) -> None:
        """Fills a row-wise state from one saved under other column blocks. saved: [rows, C]. widths: C of them."""
        wide = saved.new_tensor(widths)
        end = wide.cumsum(0)
        for shard, tensor in self.shards:
            first, width = shard.column_offset, shard.column_widths[shard.column_block]
            shared = (end.clamp(max=first + width) - (end - wide).clamp(min=first)).clamp(min=0)
            tensor.copy_(saved[shard.row_offset : shard.row_offset + len(tensor)] @ (shared / width))


def table_entries(shards: Sequence[TableShard], states: Sequence[Mapping[str, Tensor]]) -> list[TableEntry]:
    """Everything of the tables that this rank holds a part of. states[i]: optimizer states of shards[i]."""
    parts: dict[str, list[tuple[TableShard, Tensor]]] = defaultdict(list)
    for shard, own in zip(shards, states, strict=True):
        for kind, tensor in {WEIGHT: shard.weight, **own}.items():
            parts[f"{shard.table}.{kind}"].append((shard, tensor))
    return [_entry(name, tuple(own)) for name, own in parts.items()]


def _entry(name: str, shards: tuple[tuple[TableShard, Tensor], ...]) -> TableEntry:
    first, tensor = shards[0]
    is_rowwise = tensor.dim() == 1
    if first.replicated:
        return TableEntry(name, is_rowwise, first.column_widths, as_matrix(tensor), shards)
    everywhere = first.kernel.config.embedding_tables[first.index].global_metadata.shards_metadata
    columns = sorted({m.shard_offsets[1] for m in everywhere})
    shape = (first.shape[0], len(columns)) if is_rowwise else first.shape
    metadata = [_state_shard(m, columns) if is_rowwise else m for m in everywhere]
    local = []
    for shard, part in shards:
        # Not found by its offset: shards without rows all start below the last row.
        own = shard.kernel.config.embedding_tables[shard.index].local_metadata
        local.append(Shard(as_matrix(part), _state_shard(own, columns) if is_rowwise else own))
    value = ShardedTensor._init_from_local_shards_and_global_metadata(
        local,
        ShardedTensorMetadata(metadata, torch.Size(shape), TensorProperties(dtype=tensor.dtype)),
        process_group=first.group,
    )
    return TableEntry(name, is_rowwise, first.column_widths, value, shards)


def as_matrix(tensor: Tensor) -> Tensor:
    """A view with 2 dimensions of a weight or state, which may have no rows."""
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(1)


def _state_shard(weight: ShardMetadata, columns: list[int]) -> ShardMetadata:
    return ShardMetadata(
        shard_offsets=[weight.shard_offsets[0], columns.index(weight.shard_offsets[1])],
        shard_sizes=[weight.shard_sizes[0], 1],
        placement=weight.placement,
    )


def sharded(whole: list[ShardMetadata], own: Sequence[Tensor]) -> ShardedTensor:
    """The tensor of two dimensions whose shards over all ranks are `whole`. own: this rank's, in their order there."""
    mine = [each for each in whole if each.placement is not None and each.placement.rank() == dist.get_rank()]
    size = [max(each.shard_offsets[dim] + each.shard_sizes[dim] for each in whole) for dim in (0, 1)]
    metadata = ShardedTensorMetadata(whole, torch.Size(size), TensorProperties(dtype=own[0].dtype))
    shards = [Shard(tensor, each) for tensor, each in zip(own, mine, strict=True)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=dist.group.WORLD)

"""Table weights and optimizer states as ShardedTensors, so that DCP can load them under any other plan.

A row-wise state (one number a row) is saved as [rows, C], C being the number of column shards: under column-wise
sharding every column shard keeps its own. Loading into another C takes their mean.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from gr.embeddings.shards import TableShard

WEIGHT = "weight"


@dataclass(frozen=True)
class TableEntry:
    """One saved tensor of one table, `<table>.weight` or `<table>.<state>`.

    value: what DCP saves and loads in place. shards: this rank's parts of it.
    """

    name: str
    is_rowwise: bool
    value: ShardedTensor | Tensor
    shards: tuple[tuple[TableShard, Tensor], ...]

    def fill_rowwise(self, saved: Tensor) -> None:
        """Fills a row-wise state from one saved under another number of column shards. saved: [rows, C]."""
        mean = saved.mean(dim=1)
        for shard, tensor in self.shards:
            tensor.copy_(mean[shard.row_offset : shard.row_offset + len(tensor)])


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
        return TableEntry(name, is_rowwise, tensor.view(len(tensor), -1), shards)
    everywhere = first.kernel.config.embedding_tables[first.index].global_metadata.shards_metadata
    columns = sorted({m.shard_offsets[1] for m in everywhere})
    metadata = [_state_shard(m, columns) if is_rowwise else m for m in everywhere]
    shape = (first.shape[0], len(columns)) if is_rowwise else first.shape
    by_offset = {tuple(m.shard_offsets): m for m in metadata}
    local = [
        Shard(t.view(len(t), -1), by_offset[(s.row_offset, s.column_shard if is_rowwise else s.column_offset)])
        for s, t in shards
    ]
    value = ShardedTensor._init_from_local_shards_and_global_metadata(
        local,
        ShardedTensorMetadata(list(metadata), torch.Size(shape), TensorProperties(dtype=tensor.dtype)),
        process_group=dist.group.WORLD,
    )
    return TableEntry(name, is_rowwise, value, shards)


def _state_shard(weight: ShardMetadata, columns: list[int]) -> ShardMetadata:
    return ShardMetadata(
        shard_offsets=[weight.shard_offsets[0], columns.index(weight.shard_offsets[1])],
        shard_sizes=[weight.shard_sizes[0], 1],
        placement=weight.placement,
    )

"""Tables whose sets have more ways than in the checkpoint that they are loaded from. Every id keeps its set and its
way.

Row s A + w of the checkpoint is row s A' + w. The rows of a shard are one stretch of the saved rows, which is loaded
beside it and then dealt out: until then its memory is taken twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ShardMetadata

from gr.embeddings.dynamic import IdEntry
from gr.embeddings.state import TableEntry, as_matrix, sharded


@dataclass(frozen=True)
class GrownEntry:
    """A tensor as the checkpoint has it (gr.checkpoint.store.SavedTable). deal_out: copies it to where it belongs."""

    name: str
    value: ShardedTensor | Tensor
    deal_out: Callable[[], None]
    column_widths: tuple[int, ...] = ()
    is_rowwise: bool = False

    def fill_rowwise(self, saved: Tensor, widths: Sequence[int]) -> None:
        raise TypeError(f"{self.name} is loaded as it was saved")


def grown(entry: TableEntry | IdEntry, before: int, ways: int) -> GrownEntry:
    """The entry of a table of `ways` ways as it was with `before` of them."""
    return _grown_sets(entry, before, ways) if isinstance(entry, IdEntry) else _grown_rows(entry, before, ways)


def _grown_sets(entry: IdEntry, before: int, ways: int) -> GrownEntry:
    """[sets, ways]: the first ways of each set. The counts of ids without a row lie elsewhere, and begin anew."""
    whole = [_resized(each, 1, each.shard_sizes[1] * before // ways) for each in entry.value.metadata().shards_metadata]
    (own,) = entry.value.local_shards()
    loaded = own.tensor.new_empty(len(own.tensor), own.tensor.shape[1] * before // ways)

    def deal_out() -> None:
        if not entry.name.endswith(".seen"):
            own.tensor[:, :before] = loaded

    return GrownEntry(entry.name, sharded(whole, [loaded]), deal_out)


def _grown_rows(entry: TableEntry, before: int, ways: int) -> GrownEntry:
    """[rows, columns], of weights and of states."""

    def old(row: int) -> int:
        return row // ways * before + min(row % ways, before)

    def saved_part(first: int, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """(a tensor for the saved rows of a part that starts at `first`, where in the part they belong)."""
        saved = torch.arange(old(first), old(first + len(tensor)), device=tensor.device)
        return tensor.new_empty(len(saved), *tensor.shape[1:]), saved // before * ways + saved % before - first

    tensors = [as_matrix(tensor) for _, tensor in entry.shards]
    parts = [saved_part(shard.row_offset, tensor) for (shard, _), tensor in zip(entry.shards, tensors, strict=True)]

    def deal_out() -> None:
        for tensor, (loaded, place) in zip(tensors, parts, strict=True):
            tensor[place] = loaded

    if not isinstance(entry.value, ShardedTensor):
        return GrownEntry(entry.name, parts[0][0], deal_out, entry.column_widths)
    whole = []
    for each in entry.value.metadata().shards_metadata:
        first, stop = each.shard_offsets[0], each.shard_offsets[0] + each.shard_sizes[0]
        moved = ShardMetadata([old(first), each.shard_offsets[1]], list(each.shard_sizes), each.placement)
        whole.append(_resized(moved, 0, old(stop) - old(first)))
    return GrownEntry(entry.name, sharded(whole, [loaded for loaded, _ in parts]), deal_out, entry.column_widths)


def _resized(metadata: ShardMetadata, dim: int, size: int) -> ShardMetadata:
    sizes = [size if each == dim else old for each, old in enumerate(metadata.shard_sizes)]
    return ShardMetadata(list(metadata.shard_offsets), sizes, metadata.placement)

"""Batches: of user histories, jagged without padding, and of tabular rows.

B examples, T packed tokens (sum of lengths). Token arrays are packed example after example, oldest event first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ITEM_FEATURE = "item_id"


@dataclass(frozen=True)
class _Movable:
    def to(self, device: torch.device, non_blocking: bool = False):
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor | KeyedJaggedTensor):
                moved[name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


@dataclass(frozen=True)
class SequenceBatch(_Movable):
    """Histories and, for every position, the item that came next.

    features: KeyedJaggedTensor with the key ITEM_FEATURE and stride B; its values are the T input item ids.
    target_ids_T: int64, the next item of each position.
    timestamps_T, query_timestamps_T: int64 seconds, of the event and of the next one; None where the data has none.
    first_example: index, in the training order, of the first example of the global batch that this is part of.
    """

    features: KeyedJaggedTensor
    target_ids_T: Tensor
    timestamps_T: Tensor | None
    query_timestamps_T: Tensor | None
    first_example: int


@dataclass(frozen=True)
class EvaluationBatch(_Movable):
    """Histories and the one held-out item of each.

    features, timestamps_T: as in SequenceBatch. query_timestamps_T: time of the next event, which for the last token
    of an example is the time of its target.
    target_ids_B: int64. valid_B: bool, False for rows that only fill up the batch and must not be counted.
    seen_ids, seen_offsets: int64, jagged [B]: the items that may not be recommended to each user.
    """

    features: KeyedJaggedTensor
    timestamps_T: Tensor | None
    query_timestamps_T: Tensor | None
    target_ids_B: Tensor
    valid_B: Tensor
    seen_ids: Tensor
    seen_offsets: Tensor


@dataclass(frozen=True)
class TabularBatch(_Movable):
    """Rows of dense features and ids, each with a label.

    dense_BN: float32. sparse: KeyedJaggedTensor, int64 ids, keys in the order of the schema, stride B; every example
    has `hots` ids of a key. labels_B: float32.
    first_example: number, in the order of the pass, of the first example of the global batch that this is part of.
    """

    dense_BN: Tensor
    sparse: KeyedJaggedTensor
    labels_B: Tensor
    first_example: int

    def padded(self, size: int, hots: Sequence[int]) -> "TabularBatch":
        """`size` rows, those added being zero: pooled tables need as many on every rank. hots: ids of a row, by key."""
        here, keys = len(self.labels_B), self.sparse.keys()
        added = size - here
        if not added:
            return self
        parts = self.sparse.values().split([here * width for width in hots])
        ids = [torch.cat([part, part.new_zeros(added * width)]) for part, width in zip(parts, hots, strict=True)]
        lengths = torch.tensor(hots, device=self.labels_B.device).repeat_interleave(size)
        return TabularBatch(
            dense_BN=F.pad(self.dense_BN, (0, 0, 0, added)),
            sparse=KeyedJaggedTensor(keys=keys, values=torch.cat(ids), lengths=lengths, stride=size),
            labels_B=F.pad(self.labels_B, (0, added)),
            first_example=self.first_example,
        )

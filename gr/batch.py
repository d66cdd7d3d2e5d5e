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
class HistoryBatch(_Movable):
    """Histories with the actions taken, of which the newest events of each example are to be predicted.

    features: KeyedJaggedTensor of stride B; ITEM_FEATURE and each event feature have the T events of the examples,
    each contextual feature has one id an example, none where that has no event.
    actions_T: int64, bit k: action k was taken. labels_TC: float32, what each of C tasks is to predict.
    timestamps_T: int64 seconds, or None. numeric_BK: float32, K contextual numbers. user_B: int64 ids.
    scored_B: int64, how many of an example's newest events are predicted. scored: their sum.
    first_example: as in SequenceBatch.
    """

    features: KeyedJaggedTensor
    actions_T: Tensor
    labels_TC: Tensor
    timestamps_T: Tensor | None
    numeric_BK: Tensor
    user_B: Tensor
    scored_B: Tensor
    scored: int
    first_example: int

    def targets(self) -> tuple[Tensor, Tensor]:
        """Labels [P, C] and users [P] of the P = scored predictions."""
        length_B = self.features[ITEM_FEATURE].lengths().long()
        stop_B = length_B.cumsum(0)
        example_P = torch.arange(len(length_B), device=stop_B.device).repeat_interleave(
            self.scored_B, output_size=self.scored
        )
        before_B = stop_B - self.scored_B.cumsum(0)  # unpredicted events up to and with this example's
        place_P = torch.arange(self.scored, device=stop_B.device) + before_B[example_P]
        return self.labels_TC[place_P], self.user_B[example_P]


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

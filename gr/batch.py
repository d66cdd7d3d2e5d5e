"""Batches of user histories, jagged without padding, and batches of tabular rows.

B examples, T packed tokens (sum of lengths). Token arrays are packed example after example, oldest event first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ITEM_FEATURE = "item_id"


def move_ids(ids: KeyedJaggedTensor, device: torch.device) -> KeyedJaggedTensor:
    """The ids on `device`. Lengths per key are summed before the copy, which spares a synchronisation after it."""
    return ids if ids.values().device == device else ids.sync().to(device)


@dataclass(frozen=True)
class Movable:
    """A batch, or a part of one, whose tensors live on one device."""

    def to(self, device: torch.device) -> Self:
        moved = {name: x.to(device) if isinstance(x, Tensor) else move_ids(x, device) for name, x in self._tensors()}
        return replace(self, **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Calls Tensor.record_stream on every tensor."""
        for _, tensor in self._tensors():
            tensor.record_stream(stream)

    def _tensors(self) -> Iterator[tuple[str, Tensor | KeyedJaggedTensor]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | KeyedJaggedTensor):
                yield field.name, value


class Packed(NamedTuple):
    """A batch as int64 tensors, so that examples can be taken out and put together.

    lengths_B: tokens of each example. examples_BG: G values of each example. tokens_TF: F values of each token. A
    float32 value is held as the bits of the float64 that equals it. first_token_B: as in RetrievalBatch.
    """

    lengths_B: Tensor
    examples_BG: Tensor
    tokens_TF: Tensor
    first_token_B: Tensor | None = None


def _as_integers(x: Tensor) -> Tensor:
    return x.double().view(torch.int64)


def _as_floats(bits: Tensor) -> Tensor:
    return bits.contiguous().view(torch.float64).float()


@dataclass(frozen=True)
class RetrievalBatch(Movable):
    """Histories and, for every position, the next item.

    features: KeyedJaggedTensor with the key ITEM_FEATURE and stride B; its values are the T input item ids.
    target_ids_T: int64, the next item of each position.
    timestamps_T, query_timestamps_T: int64 seconds, of the event and of the next one; None where the data has none.
    first_example: index, in the training order, of the first example of the global batch that this is part of.
    first_token_B: int64, the number of each example's first token in the global batch, where examples have changed
    ranks; None: the ranks' examples follow one another.
    """

    features: KeyedJaggedTensor
    target_ids_T: Tensor
    timestamps_T: Tensor | None
    query_timestamps_T: Tensor | None
    first_example: int
    first_token_B: Tensor | None = None

    def pack(self) -> Packed:
        columns = [self.features.values(), self.target_ids_T, self.timestamps_T, self.query_timestamps_T]
        tokens_TF = torch.stack([column for column in columns if column is not None], dim=1)
        lengths_B = self.features.lengths().long()
        return Packed(lengths_B, lengths_B.new_empty(len(lengths_B), 0), tokens_TF, self.first_token_B)

    def unpack(self, packed: Packed) -> Self:
        """A batch of other examples, which pack() of such a batch has packed."""
        items_T, targets_T, *times = packed.tokens_TF.T.contiguous()
        timestamps_T, query_timestamps_T = times or (None, None)
        return replace(
            self,
            features=KeyedJaggedTensor(keys=[ITEM_FEATURE], values=items_T, lengths=packed.lengths_B),
            target_ids_T=targets_T,
            timestamps_T=timestamps_T,
            query_timestamps_T=query_timestamps_T,
            first_token_B=packed.first_token_B,
        )


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(RetrievalBatch):
    """A RetrievalBatch whose next items are compared with K others that the user liked less, soon after them.

    rejected_TK: int64 items. gap_TK: int64, the levels that each is below the next item, from 1; 0 for one that is not
    compared. A position has a pair where its first gap is above 0.
    """

    rejected_TK: Tensor
    gap_TK: Tensor

    def pack(self) -> Packed:
        packed = super().pack()
        return packed._replace(tokens_TF=torch.cat([packed.tokens_TF, self.rejected_TK, self.gap_TK], 1))

    def unpack(self, packed: Packed) -> Self:
        K = self.rejected_TK.shape[1]
        tokens_TF, rejected_TK, gap_TK = packed.tokens_TF.split([packed.tokens_TF.shape[1] - 2 * K, K, K], 1)
        unpacked = super().unpack(packed._replace(tokens_TF=tokens_TF))
        return replace(unpacked, rejected_TK=rejected_TK, gap_TK=gap_TK)


@dataclass(frozen=True, kw_only=True)
class PromptBatch(RetrievalBatch):
    """A RetrievalBatch of histories after which a policy lists items: it is asked at the newest token of each.

    number_B: int64, the place of each example in the training order, which names its draws.
    """

    number_B: Tensor

    def pack(self) -> Packed:
        return super().pack()._replace(examples_BG=self.number_B[:, None])

    def unpack(self, packed: Packed) -> Self:
        return replace(super().unpack(packed), number_B=packed.examples_BG[:, 0])


@dataclass(frozen=True)
class EvaluationBatch(Movable):
    """Histories, each with its one held-out item, or with none: the item that comes next is asked for.

    features, timestamps_T: as in RetrievalBatch. query_timestamps_T: time of the next event, which for the last token
    of an example is the time of its target, or its own where there is none.
    target_ids_B: int64, 0 for none. valid_B: bool, False for rows that only fill up the batch and must not be counted,
    and for histories without an event.
    seen_ids, seen_offsets: int64, jagged [B]: the items that may not be recommended to each user.
    user_B: int64 ids, where they were read.
    """

    features: KeyedJaggedTensor
    timestamps_T: Tensor | None
    query_timestamps_T: Tensor | None
    target_ids_B: Tensor
    valid_B: Tensor
    seen_ids: Tensor
    seen_offsets: Tensor
    user_B: Tensor | None = None


@dataclass(frozen=True)
class RankingBatch(Movable):
    """Histories with the actions taken, of which the newest events of each example are to be predicted.

    features: KeyedJaggedTensor of stride B. ITEM_FEATURE and each event feature have the T events of the examples; each
    contextual feature has one id an example, or none where the example has no event.
    actions_T: int64, bit k: action k was taken. labels_TC: float32, the labels of C tasks.
    timestamps_T: int64 seconds, or None. numeric_BK: float32, K contextual numbers. user_B: int64 ids.
    scored_B: int64, the number of an example's newest events that are predicted. scored: the sum of scored_B.
    first_example: as in RetrievalBatch. contextual: the number of contextual features, which are the last ones.
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
    contextual: int = 0

    def pack(self) -> Packed:
        lengths_B = self.features[ITEM_FEATURE].lengths().long()
        events, contextual = self._keys()
        token_columns = [self.actions_T, *(self.features[key].values() for key in events)]
        if self.timestamps_T is not None:
            token_columns.append(self.timestamps_T)
        zeros_B = torch.zeros_like(lengths_B)
        ids = [zeros_B.masked_scatter(lengths_B > 0, self.features[key].values()) for key in contextual]
        return Packed(
            lengths_B,
            torch.cat([torch.stack([self.user_B, self.scored_B, *ids], 1), _as_integers(self.numeric_BK)], 1),
            torch.cat([torch.stack(token_columns, 1), _as_integers(self.labels_TC)], 1),
        )

    def unpack(self, packed: Packed) -> Self:
        """A batch of other examples, which pack() of such a batch has packed."""
        events, contextual = self._keys()
        tasks, numbers = self.labels_TC.shape[1], self.numeric_BK.shape[1]
        tokens_TF, labels_TC = packed.tokens_TF.split([packed.tokens_TF.shape[1] - tasks, tasks], 1)
        actions_T, *token_columns = tokens_TF.T.contiguous()
        examples_BG, numeric_BK = packed.examples_BG.split([2 + len(contextual), numbers], 1)
        user_B, scored_B, *ids = examples_BG.T.contiguous()
        nonempty_B = packed.lengths_B > 0
        values = [*token_columns[: len(events)], *(column[nonempty_B] for column in ids)]
        lengths = [packed.lengths_B] * len(events) + [nonempty_B.long()] * len(ids)
        return replace(
            self,
            features=KeyedJaggedTensor([*events, *contextual], torch.cat(values), lengths=torch.cat(lengths)),
            actions_T=actions_T,
            labels_TC=_as_floats(labels_TC),
            timestamps_T=None if self.timestamps_T is None else token_columns[-1],
            numeric_BK=_as_floats(numeric_BK),
            user_B=user_B,
            scored_B=scored_B,
            scored=int(scored_B.sum()),
        )

    def _keys(self) -> tuple[list[str], list[str]]:
        """The keys of the event features, and those of the contextual features, which come last."""
        keys = self.features.keys()
        events = len(keys) - self.contextual
        return keys[:events], keys[events:]

    def targets(self) -> tuple[Tensor, Tensor]:
        """Labels [P, C] and users [P] of the P = scored predictions."""
        length_B = self.features[ITEM_FEATURE].lengths().long()
        stop_B = length_B.cumsum(0)
        example_P = torch.arange(len(length_B), device=stop_B.device).repeat_interleave(
            self.scored_B, output_size=self.scored
        )
        before_B = stop_B - self.scored_B.cumsum(0)  # events without a prediction up to the end of each example
        place_P = torch.arange(self.scored, device=stop_B.device) + before_B[example_P]
        return self.labels_TC[place_P], self.user_B[example_P]


@dataclass(frozen=True)
class TabularBatch(Movable):
    """Rows of dense features and ids, each with a label.

    dense_BN: float32. sparse: KeyedJaggedTensor, int64 ids, keys in the order of the schema, stride B; every example
    has `hots` ids of a key. labels_B: float32.
    first_example: index, in the order of the pass, of the first example of the global batch that this is part of.
    """

    dense_BN: Tensor
    sparse: KeyedJaggedTensor
    labels_B: Tensor
    first_example: int

    def padded(self, size: int, hots: Sequence[int]) -> "TabularBatch":
        """The batch with rows of zeros, without ids, up to `size`: pooled tables need equal batches. hots: ids of a row
        that is there, by key.
        """
        rows, sparse = len(self.labels_B), self.sparse
        added = size - rows
        if not added:
            return self
        lengths_FB = torch.tensor(hots, device=self.labels_B.device)[:, None].expand(-1, rows)
        lengths = F.pad(lengths_FB, (0, added)).flatten()
        return TabularBatch(
            dense_BN=F.pad(self.dense_BN, (0, 0, 0, added)),
            sparse=KeyedJaggedTensor(sparse.keys(), sparse.values(), lengths=lengths, stride=size),
            labels_B=F.pad(self.labels_B, (0, added)),
            first_example=self.first_example,
        )


@dataclass(frozen=True)
class TokenBatch(Movable):
    """Pieces of documents, each token with the one that follows it. T tokens, B pieces.

    ids_T, target_ids_T: int64. scored_T: bool, False where the target is of a prompt. offsets_B1: int64, the pieces.
    """

    ids_T: Tensor
    target_ids_T: Tensor
    scored_T: Tensor
    offsets_B1: Tensor

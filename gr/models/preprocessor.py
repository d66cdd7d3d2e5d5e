"""The tokens of ranking: context, then events as one or two tokens each, then candidates.

B examples, T events, S tokens of all examples, C contextual tokens of an example, D width, N most events of an example.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.config.ranking import InterleavedInput, RankingModelConfig
from gr.ops.time_encoding import time_bucket
from gr.sequence import JaggedSequence


@dataclass(frozen=True)
class TokenLayout:
    """Places of tokens, int64. example_T, place_T: of each event, and its place in it. history_B: its events that are
    no candidates. offsets_B1: of the tokens of examples. item_T: of each event's item. action_A: of the actions of the
    events acting_A, which are the history's where the input is interleaved, else none. context_CB: of the C contextual
    tokens of the B' examples that have events.
    """

    example_T: Tensor
    place_T: Tensor
    history_B: Tensor
    offsets_B1: Tensor
    item_T: Tensor
    action_A: Tensor
    acting_A: Tensor
    context_CB: Tensor


def interleave(length_B: Tensor, candidates_B: Tensor, contextual: int, interleaved: bool) -> TokenLayout:
    """length_B: events of each example, of which the newest candidates_B have no action token."""
    examples = torch.arange(len(length_B), device=length_B.device)
    example_T = examples.repeat_interleave(length_B)
    first_T = (length_B.cumsum(0) - length_B)[example_T]
    place_T = torch.arange(len(example_T), device=length_B.device) - first_T
    history_B = length_B - candidates_B
    tokens_B = length_B + contextual * (length_B > 0) + (history_B if interleaved else 0)
    offsets_B1 = F.pad(tokens_B.cumsum(0), (1, 0))
    extra_T = torch.minimum(place_T, history_B[example_T]) if interleaved else 0
    item_T = offsets_B1[example_T] + contextual + place_T + extra_T
    acts_T = place_T < history_B[example_T] if interleaved else torch.zeros_like(place_T, dtype=torch.bool)
    acting_A = acts_T.nonzero().squeeze(1)
    starts = offsets_B1[:-1][length_B > 0]
    context_CB = starts + torch.arange(contextual, device=length_B.device)[:, None]
    return TokenLayout(example_T, place_T, history_B, offsets_B1, item_T, item_T[acting_A] + 1, acting_A, context_CB)


class SequencePreprocessor(nn.Module):
    """Vectors of a batch's features -> the tower's input, in one of two forms.

    absolute: what is added to a token does not tell what comes after it. Positions count from the window's oldest
    event, times are since the event before, and context is plain tokens. Candidates share the position after the
    history, and the time from its newest event to the request, which is the first candidate's time.
    request: positions count back from the request, times are ages at it, and context is a prefix that sees ahead.
    Where every event is predicted (no candidates) the form is absolute.
    """

    def __init__(
        self, config: RankingModelConfig, *, max_events: int, actions: int, contextual: int, numeric: int
    ) -> None:
        """contextual: features of ids; numeric: of numbers. Both are tokens, in this order."""
        super().__init__()
        D = config.dim
        self.dim, self.max_events, self.contextual = D, max_events, contextual + numeric
        self.interleaved, self.time = isinstance(config.input, InterleavedInput), config.time
        self.place = config.place
        self.max_length = self.contextual + max_events * (2 if self.interleaved else 1)
        self.actions = nn.Parameter(torch.empty(actions, D))
        self.acted = nn.Parameter(torch.empty(D))  # of every known set of actions, the empty one too
        # None, and not empty, where it has no use: DDP waits for the gradient of every parameter.
        self.candidate = None if self.interleaved else nn.Parameter(torch.empty(D))
        self.numeric = nn.Parameter(torch.empty(2, numeric, D)) if numeric else None  # slope, offset
        self.position = nn.Parameter(torch.empty(max_events + 1 + self.contextual, D))
        self.age = None if config.time is None else nn.Parameter(torch.empty(config.time.buckets, D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=self.dim**-0.5)

    def forward(
        self, batch: RankingBatch, items_TD: Tensor, context_CBD: list[Tensor], candidates_B: Tensor | None
    ) -> tuple[JaggedSequence, TokenLayout]:
        """items_TD: of the events' items. context_CBD: [B', D] of each contextual feature of ids, B' examples with
        events. candidates_B: how many of an example's newest events are candidates; None: none, all are predicted.
        """
        length_B = batch.features[ITEM_FEATURE].lengths().long()
        hidden_B = torch.zeros_like(length_B) if candidates_B is None else candidates_B
        layout = interleave(length_B, hidden_B, self.contextual, self.interleaved)
        bits_TA = (batch.actions_T[:, None] >> torch.arange(len(self.actions), device=items_TD.device)) & 1
        acted_TD = bits_TA.to(items_TD.dtype) @ self.actions + self.acted
        place_TD = self._place(batch, layout, candidates_B)
        items_TD = items_TD * self.dim**0.5 + place_TD
        if self.candidate is not None:
            known_T1 = (layout.place_T < layout.history_B[layout.example_T])[:, None]
            items_TD = items_TD + torch.where(known_T1, acted_TD, self.candidate)
        actions_AD = (acted_TD + place_TD)[layout.acting_A]
        context = [*context_CBD, *self._numbers(batch.numeric_BK[length_B > 0])]
        context_D = [
            vector_BD + position_D
            for vector_BD, position_D in zip(context, self.position[self.max_events + 1 :], strict=True)
        ]
        vectors_SD = torch.cat([*context_D, items_TD, actions_AD])
        places_S = torch.cat([layout.context_CB.flatten(), layout.item_T, layout.action_A])
        values_SD = torch.zeros_like(vectors_SD).index_copy(0, places_S, vectors_SD)
        times_S, next_S = self._times(batch, layout, places_S)
        sequence = JaggedSequence(
            values_SD,
            layout.offsets_B1,
            self.max_length,
            times_S,
            next_S,
            candidates_B,
            0 if self._absolute(candidates_B) else self.contextual,
        )
        return sequence, layout

    def _numbers(self, numeric_BK: Tensor) -> list[Tensor]:
        if self.numeric is None:
            return []
        slope_KD, offset_KD = self.numeric
        return [
            x_B[:, None] * slope_D + offset_D
            for x_B, slope_D, offset_D in zip(numeric_BK.unbind(1), slope_KD, offset_KD, strict=True)
        ]

    def _absolute(self, candidates_B: Tensor | None) -> bool:
        return candidates_B is None or self.place == "absolute"

    def _place(self, batch: RankingBatch, layout: TokenLayout, candidates_B: Tensor | None) -> Tensor:
        """Vectors of position and time of each event, [T, D]."""
        absolute = self._absolute(candidates_B)
        history_T = layout.history_B[layout.example_T]
        from_oldest_T = torch.minimum(layout.place_T, history_T)
        position_T = from_oldest_T if absolute else history_T - from_oldest_T
        place_TD = F.embedding(position_T, self.position)
        if self.age is None or self.time is None:
            return place_TD
        times_T = batch.timestamps_T
        assert times_T is not None, "checked against the schema"
        start_T = torch.arange(len(times_T), device=times_T.device) - layout.place_T
        if absolute:
            moment_T = start_T + from_oldest_T  # of a candidate: the first candidate
            seconds_T = times_T[moment_T] - times_T[(moment_T - 1).clamp(min=0)]
            seconds_T = seconds_T.masked_fill(from_oldest_T == 0, 0)
        else:
            seconds_T = times_T[start_T + history_T] - times_T
        return place_TD + F.embedding(time_bucket(seconds_T, self.time.scale, self.time.buckets), self.age)

    def _times(self, batch: RankingBatch, layout: TokenLayout, places_S: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The time of each token, and that of the token after it in its example (the last one has its own)."""
        if batch.timestamps_T is None:
            return None, None
        first_B = (layout.place_T == 0).nonzero().squeeze(1)
        context_CB = batch.timestamps_T[first_B].expand(self.contextual, -1)
        unordered = torch.cat([context_CB.flatten(), batch.timestamps_T, batch.timestamps_T[layout.acting_A]])
        times_S = torch.empty_like(unordered).index_copy(0, places_S, unordered)
        next_S = torch.cat([times_S[1:], times_S[:0].new_zeros(min(1, len(times_S)))])
        last_B = (layout.offsets_B1[1:] - 1)[layout.offsets_B1.diff() > 0]
        return times_S, next_S.index_copy(0, last_B, times_S[last_B])

"""JaggedSequence, the input and the output of every tower. B examples, T packed tokens, D width."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class JaggedSequence:
    """Packed sequences of vectors.

    values_TD: float. offsets_B1: int64 [B+1], offsets_B1[-1] == T. max_length: no sequence is longer, in tokens.
    timestamps_T, query_timestamps_T: int64 seconds of the event and of the next one, or None.
    num_targets_B: int64, the number of each sequence's last tokens that are candidates; None: there are no candidates.
    contextual_len: the number of first tokens of every nonempty sequence that are context, not events.
    """

    values_TD: Tensor
    offsets_B1: Tensor
    max_length: int
    timestamps_T: Tensor | None = None
    query_timestamps_T: Tensor | None = None
    num_targets_B: Tensor | None = None
    contextual_len: int = 0

    def require_events_only(self, tower: str) -> None:
        """Raises ValueError where there are candidates or a contextual prefix, which `tower` would treat as events."""
        if self.num_targets_B is not None or self.contextual_len:
            raise ValueError(f"{tower} has no mask for candidates or a contextual prefix; use the STU tower")

    def with_values(self, values_TD: Tensor) -> "JaggedSequence":
        return replace(self, values_TD=values_TD)

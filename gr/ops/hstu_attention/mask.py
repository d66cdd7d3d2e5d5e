"""The tokens of its own sequence that a query sees, beyond the causal rule. B sequences, T packed tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """A sequence is a contextual prefix, a history and candidates, in this order; each of the three may be absent.

    num_targets_B: int64 [B], the number of candidates, which are the last tokens of a sequence. A candidate sees the
        history and itself; no other token sees it. All candidates stand at the position after the history.
    max_attn_len: the window, the number of tokens before itself that a token sees, 0 for all. Candidates count from the
        end of the history. The whole prefix counts as one token, so it lies outside the window of later tokens.
    contextual_len: the tokens of the prefix, in every sequence that is not empty. They see prefix and history, also
        ahead of themselves, whatever the window; so in a stack of layers the history sees its own future through them.
    min_full_attn_seq_len: with a window, so many of the newest tokens of the history, and all candidates, see
        everything before them.
    Source: the mask of the public production code (meta-recsys/generative-recommenders, pt_hstu_attention.py).
    """

    num_targets_B: Tensor | None = None
    max_attn_len: int = 0
    contextual_len: int = 0
    min_full_attn_seq_len: int = 0

    @property
    def causal(self) -> bool:
        """True if the mask is the causal rule alone."""
        return self.num_targets_B is None and not self.max_attn_len and not self.contextual_len

    def seen(self, length: int, history: Tensor) -> Tensor:
        """bool [..., n, n]: whether query i sees key j, for n = length tokens, of which those from `history` on are
        candidates, or padding, which no other token sees. history: int64 [...], on any device.

        Tokens are renumbered as in the public production code: the prefix is one place, the candidates are another.
        """
        place_n = torch.arange(length, device=history.device)
        end_1 = history[..., None]
        if self.contextual_len:
            place_n = (place_n - self.contextual_len + 1).clamp(min=0)
            end_1 = end_1 - self.contextual_len + 1
        place_n = place_n.clamp(max=end_1)
        i_n1, j_1n, end_11 = place_n[..., :, None], place_n[..., None, :], end_1[..., None]
        seen_nn = (i_n1 > j_1n) | torch.eye(length, dtype=torch.bool, device=history.device)
        if self.max_attn_len:
            near_nn = i_n1 - j_1n <= self.max_attn_len
            if self.min_full_attn_seq_len:
                near_nn = near_nn | (i_n1 >= end_11 - self.min_full_attn_seq_len)
            seen_nn = seen_nn & near_nn
        if self.contextual_len:
            seen_nn = seen_nn | ((i_n1 == 0) & (j_1n < end_11))
        return seen_nn

    def check(self, offsets_B1: Tensor) -> None:
        """Raises ValueError unless the mask fits the sequences. Values of tensors are read on CPU only."""
        for name in ("max_attn_len", "contextual_len", "min_full_attn_seq_len"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: it is {getattr(self, name)}")
        if self.min_full_attn_seq_len and not self.max_attn_len:
            raise ValueError("min_full_attn_seq_len widens the window of max_attn_len, which is 0: set it or drop both")
        targets_B = self.num_targets_B
        sequences = offsets_B1.numel() - 1
        if targets_B is not None:
            if targets_B.dtype != torch.int64 or targets_B.shape != (sequences,):
                raise ValueError(
                    f"num_targets_B must be int64 of shape [B] = [{sequences}], "
                    f"not {targets_B.dtype} of {list(targets_B.shape)}"
                )
            if targets_B.device != offsets_B1.device:
                raise ValueError(f"num_targets_B is on {targets_B.device}, offsets_B1 on {offsets_B1.device}")
        if offsets_B1.device.type == "cpu":
            self._check_lengths(offsets_B1.diff())

    def _check_lengths(self, lengths_B: Tensor) -> None:
        targets_B = torch.zeros_like(lengths_B) if self.num_targets_B is None else self.num_targets_B
        for wrong_B, problem in (
            (targets_B < 0, "which is negative"),
            (targets_B > lengths_B, "more than it has tokens"),
            ((lengths_B > 0) & (lengths_B - targets_B < self.contextual_len), "which leaves too few for the prefix"),
        ):
            if bool(wrong_B.any()):
                b = int(wrong_B.nonzero()[0])
                raise ValueError(
                    f"num_targets_B is {int(targets_B[b])} for sequence {b} of {int(lengths_B[b])} tokens, {problem}"
                    + (f" of contextual_len = {self.contextual_len}" if "prefix" in problem else "")
                )

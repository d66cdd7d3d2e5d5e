"""STU, the production form of HSTU: no relative bias, scaled scores, a three times wider output.

T packed tokens, D model width, H heads, Q query/key width per head, V value width per head.
Source: modules/stu.py of meta-recsys/generative-recommenders; arXiv 2402.17152, Eq. 1-3 and section 3.3.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gr.config.stu import STUConfig
from gr.ops.dropout import dropout
from gr.ops.hstu_attention import AttentionMask, hstu_attention
from gr.sequence import JaggedSequence

NORM_EPS = 1e-6


class STU(nn.Module):
    """A residual stack of identical STU layers, for sequences with a contextual prefix and candidates (both optional).

    A candidate's output depends on the history and on itself, never on another candidate. With a contextual prefix,
    which sees the whole history, the outputs of the history depend on its own later tokens: only those of the
    candidates then predict anything.
    """

    def __init__(self, config: STUConfig, *, dim: int, max_length: int) -> None:
        super().__init__()
        self.config = config
        self.divisor = float(config.divisor or max_length)
        self.layers = nn.ModuleList(STULayer(config, dim, self.divisor) for _ in range(config.layers))

    def forward(self, sequence: JaggedSequence) -> JaggedSequence:
        mask = AttentionMask(
            num_targets_B=sequence.num_targets_B,
            max_attn_len=self.config.max_attn_len,
            contextual_len=sequence.contextual_len,
            min_full_attn_seq_len=self.config.min_full_attn_seq_len,
        )
        x_TD = sequence.values_TD
        for layer in self.layers:
            x_TD = layer(x_TD, sequence, mask)
        return sequence.with_values(x_TD)


class STULayer(nn.Module):
    """x + W_o dropout([u, a, u * norm(a)]), a = attention(q, k, v), with (u, v, q, k) = W norm(x) + b, u <- silu(u)."""

    def __init__(self, config: STUConfig, dim: int, divisor: float) -> None:
        super().__init__()
        self.config, self.divisor = config, divisor
        H, Q, V = config.heads, config.qk_dim, config.v_dim
        self.splits = [H * V, H * V, H * Q, H * Q]
        self.alpha = 1 / math.sqrt(Q)
        self.input_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.uvqk = nn.Linear(dim, sum(self.splits))
        self.output_norm = nn.GroupNorm(H, H, eps=NORM_EPS) if config.group_norm else nn.LayerNorm(H * V, eps=NORM_EPS)
        self.output = nn.Linear(3 * H * V, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.uvqk, self.output):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.uvqk.bias)

    def forward(self, x_TD: Tensor, sequence: JaggedSequence, mask: AttentionMask) -> Tensor:
        attended: list[Tensor] = []  # kept when the rest of the layer is computed again

        def attend(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            u_TU, a_THV = self._attend(x_TD, sequence, mask, attended[0] if attended else None)
            if not attended:
                attended.append(a_THV.detach())
            return u_TU, a_THV

        def layer(x_TD: Tensor) -> Tensor:
            return self._gate(x_TD, *attend(x_TD))

        recompute = self.config.recompute if torch.is_grad_enabled() else "none"
        if recompute == "layer":
            return self._checkpoint(layer, x_TD)
        if recompute == "gate":
            return self._checkpoint(self._gate, x_TD, *attend(x_TD))
        return layer(x_TD)

    def _checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        random = self.training and self.config.dropout > 0
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)

    def _attend(
        self, x_TD: Tensor, sequence: JaggedSequence, mask: AttentionMask, known_THV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """u before its SiLU, [T, H V], and the attention, [T, H, V]."""
        u_TU, v, q, k = self.uvqk(self.input_norm(x_TD)).split(self.splits, dim=-1)
        q_THQ, k_THQ, v_THV = (t.unflatten(-1, (self.config.heads, -1)) for t in (q, k, v))
        a_THV = hstu_attention(
            q_THQ,
            k_THQ,
            v_THV,
            sequence.offsets_B1,
            max_length=sequence.max_length,
            divisor=self.divisor,
            alpha=self.alpha,
            mask=mask,
            output=known_THV,
        )
        return u_TU, a_THV

    def _gate(self, x_TD: Tensor, u_TU: Tensor, a_THV: Tensor) -> Tensor:
        u_TU = F.silu(u_TU)
        normed_TU = self.output_norm(a_THV if self.config.group_norm else a_THV.flatten(1)).flatten(1)
        y = torch.cat([u_TU, a_THV.flatten(1), u_TU * normed_TU], dim=-1)
        return x_TD + self.output(dropout(y, self.config.dropout, self.training))

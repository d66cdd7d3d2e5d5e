"""STU, the production form of HSTU: no relative bias, scaled scores, a three times wider output.

T packed tokens, D model width, H heads, Q query/key width per head, V value width per head.
Source: modules/stu.py of meta-recsys/generative-recommenders; arXiv 2402.17152, Eq. 1-3 and section 3.3.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gr.config.towers import STUConfig
from gr.ops.hstu_attention import AttentionMask, hstu_attention
from gr.ops.norm_linear import norm_linear
from gr.ops.norm_mul_dropout import norm_mul_dropout_linear
from gr.sequence import JaggedSequence
from gr.towers.attend import Attend

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
        self.divisor, self.alpha = float(config.divisor or max_length), 1 / math.sqrt(config.qk_dim)
        self.layers = nn.ModuleList(STULayer(config, dim) for _ in range(config.layers))

    def forward(self, sequence: JaggedSequence) -> JaggedSequence:
        attend = partial(
            hstu_attention,
            offsets_B1=sequence.offsets_B1,
            max_length=sequence.max_length,
            divisor=self.divisor,
            alpha=self.alpha,
            mask=self.mask(sequence.contextual_len, sequence.num_targets_B),
        )
        x_TD = sequence.values_TD
        for layer in self.layers:
            x_TD = layer(x_TD, attend)
        return sequence.with_values(x_TD)

    def mask(self, contextual_len: int, num_targets_B: Tensor | None = None) -> AttentionMask:
        return AttentionMask(
            num_targets_B=num_targets_B,
            max_attn_len=self.config.max_attn_len,
            contextual_len=contextual_len,
            min_full_attn_seq_len=self.config.min_full_attn_seq_len,
        )


class STULayer(nn.Module):
    """x + W_o dropout([u, a, u * norm(a)]), a = attention(q, k, v), with (u, v, q, k) = W norm(x) + b, u <- silu(u)."""

    def __init__(self, config: STUConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        H, Q, V = config.heads, config.qk_dim, config.v_dim
        self.splits = [H * V, H * V, H * Q, H * Q]
        self.input_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.uvqk = nn.Linear(dim, sum(self.splits))
        self.output_norm = nn.GroupNorm(H, H, eps=NORM_EPS) if config.group_norm else nn.LayerNorm(H * V, eps=NORM_EPS)
        self.output = nn.Linear(3 * H * V, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.uvqk, self.output):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.uvqk.bias)

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        attended: list[Tensor] = []  # kept when the rest of the layer is computed again

        def layer(x_TD: Tensor) -> Tensor:
            u_TU, q_THQ, k_THQ, v_THV = self.project(x_TD)
            a_THV = attend(q_THQ, k_THQ, v_THV, output=attended[0]) if attended else attend(q_THQ, k_THQ, v_THV)
            if not attended:
                attended.append(a_THV.detach())
            return self._gate(x_TD, u_TU, a_THV)

        if self.config.recompute == "layer" and torch.is_grad_enabled():
            random = self.training and self.config.dropout > 0
            return checkpoint(layer, x_TD, use_reentrant=False, preserve_rng_state=random)
        return layer(x_TD)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u before its SiLU, [T, H V]; q and k, [T, H, Q]; v, [T, H, V]."""
        norm = self.input_norm
        u_TU, v, q, k = norm_linear(
            x_TD,
            self.uvqk.weight.T,
            bias_O=self.uvqk.bias,
            norm_weight_D=norm.weight,
            norm_bias_D=norm.bias,
            eps=NORM_EPS,
            splits=self.splits,
        )
        q_THQ, k_THQ, v_THV = (t.unflatten(-1, (self.config.heads, -1)) for t in (q, k, v))
        return u_TU, q_THQ, k_THQ, v_THV

    def _gate(self, x_TD: Tensor, u_TU: Tensor, a_THV: Tensor) -> Tensor:
        # Of a group norm each head has one weight, which all its columns share.
        shared = self.config.v_dim if self.config.group_norm else 1
        weight_U, bias_U = (p.repeat_interleave(shared) for p in (self.output_norm.weight, self.output_norm.bias))
        return x_TD + norm_mul_dropout_linear(
            u_TU,
            a_THV.flatten(1),
            self.output.weight.T,
            norm_weight_U=weight_U,
            norm_bias_U=bias_U,
            groups=self.config.heads if self.config.group_norm else 1,
            eps=NORM_EPS,
            silu=True,
            concat=True,
            dropout=self.config.dropout if self.training else 0.0,
        )

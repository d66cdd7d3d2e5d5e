"""HSTU, research form: pointwise SiLU attention with relative bias (arXiv 2402.17152, Eq. 1-3 and App. A).

T packed tokens, D model width, H heads, Q query/key width per head, V value width per head, N max length.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.config.towers import HSTUConfig
from gr.ops.dropout import dropout
from gr.ops.hstu_attention import TimeBuckets, hstu_attention, time_bucket_ids
from gr.ops.norm_linear import norm_linear
from gr.ops.norm_mul_dropout import norm_mul_dropout_linear
from gr.ops.softmax_attention import softmax_attention
from gr.sequence import JaggedSequence
from gr.towers.attend import Attend

NORM_EPS = 1e-6
INIT_STD = 0.02
# gr_output_length of the published configurations, which divide by max_length + 10 + 1.
GENERATED_LENGTH = 10


class HSTU(nn.Module):
    """A residual stack of identical HSTU layers."""

    def __init__(self, config: HSTUConfig, *, dim: int, max_length: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(HSTULayer(config, dim, max_length) for _ in range(config.layers))

    def forward(self, sequence: JaggedSequence) -> JaggedSequence:
        sequence.require_events_only("HSTU")
        attend: Attend
        if self.config.attention == "softmax":
            attend = partial(softmax_attention, offsets_B1=sequence.offsets_B1, max_length=sequence.max_length)
        else:
            attend = partial(
                hstu_attention,
                offsets_B1=sequence.offsets_B1,
                max_length=sequence.max_length,
                divisor=self._divisor(sequence),
                time_buckets=self._time_buckets(sequence),
            )
        x_TD = sequence.values_TD
        for layer in self.layers:
            x_TD = layer(x_TD, attend)
        return sequence.with_values(x_TD)

    def _time_buckets(self, sequence: JaggedSequence) -> TimeBuckets | None:
        """Bucket ids are the same for all layers, so they are made once."""
        if not self.config.time_bias:
            return None
        if sequence.timestamps_T is None or sequence.query_timestamps_T is None:
            raise ValueError("time_bias=True needs a sequence with timestamps_T and query_timestamps_T; both are None")
        return time_bucket_ids(
            sequence.timestamps_T,
            sequence.query_timestamps_T,
            sequence.offsets_B1,
            num_buckets=self.config.time_buckets,
        )

    def divisor(self, max_length: int) -> float:
        """The divisor of attention, where all sequences have the same. max_length: tokens of the longest one."""
        if self.config.divisor == "max_len":
            return float(max_length)
        return float(self.config.divisor_value or max_length + GENERATED_LENGTH + 1)

    def _divisor(self, sequence: JaggedSequence) -> float | Tensor:
        if self.config.divisor != "actual_len":
            return self.divisor(sequence.max_length)
        lengths = sequence.offsets_B1.diff()
        return lengths.repeat_interleave(lengths, output_size=len(sequence.values_TD)).float()


class HSTULayer(nn.Module):
    """x + W_o dropout(u * norm(attention(q, k, v))), with u, v, q, k = silu(norm(x) W)."""

    def __init__(self, config: HSTUConfig, dim: int, max_length: int) -> None:
        super().__init__()
        self.config = config
        H, Q, V = config.heads, config.qk_dim, config.v_dim
        self.splits = [H * V, H * V, H * Q, H * Q]
        self.uvqk = nn.Parameter(torch.empty(dim, sum(self.splits)))
        self.output = nn.Linear(H * V * (3 if config.concat_ua else 1), dim)
        self.position_bias = nn.Parameter(torch.empty(2 * max_length - 1)) if config.position_bias else None
        self.time_bias = nn.Parameter(torch.empty(config.time_buckets + 1)) if config.time_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.uvqk, std=INIT_STD)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        for bias in (self.position_bias, self.time_bias):
            if bias is not None:
                nn.init.normal_(bias, std=INIT_STD)

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        u, q_THQ, k_THQ, v_THV = self.project(x_TD)
        biases = {"position_bias": self.position_bias, "time_bias": self.time_bias}
        a_THV = attend(q_THQ, k_THQ, v_THV, **{name: bias for name, bias in biases.items() if bias is not None})
        dropped = self.config.dropout if self.training else 0.0
        if self.config.concat_ua:
            a = F.layer_norm(a_THV.flatten(1), (u.shape[-1],), eps=NORM_EPS)
            return x_TD + self.output(dropout(torch.cat([u, a, u * a], dim=-1), dropped, self.training))
        weight, bias = self.output.weight.T, self.output.bias
        return x_TD + norm_mul_dropout_linear(u, a_THV.flatten(1), weight, bias_D=bias, eps=NORM_EPS, dropout=dropped)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, [T, H V]; q and k, [T, H, Q]; v, [T, H, V]."""
        u_TU, v, q, k = norm_linear(x_TD, self.uvqk, eps=NORM_EPS, silu=True, splits=self.splits)
        q_THQ, k_THQ, v_THV = (t.unflatten(-1, (self.config.heads, -1)) for t in (q, k, v))
        return u_TU, q_THQ, k_THQ, v_THV

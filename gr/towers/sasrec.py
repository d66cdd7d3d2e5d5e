"""SASRec (arXiv 1808.09781) on packed sequences: the softmax-attention baseline.

T packed tokens, D model width, H heads, Q width per head.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from gr.config.towers import SASRecConfig
from gr.ops.dropout import dropout
from gr.ops.softmax_attention import softmax_attention
from gr.sequence import JaggedSequence
from gr.towers.attend import Attend

NORM_EPS = 1e-8


class Norm(nn.LayerNorm):
    """A layer norm in the dtype of its input, also where its weights are gathered in bf16 (dense.gathered)."""

    def forward(self, x: Tensor) -> Tensor:
        weight_D, bias_D = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight_D, bias_D, self.eps)


class SASRec(nn.Module):
    """A stack of causal self-attention and point-wise feed-forward blocks, with a norm at the end."""

    def __init__(self, config: SASRecConfig, *, dim: int, max_length: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layers = nn.ModuleList(SASRecLayer(config, dim) for _ in range(config.layers))
        self.last_norm = Norm(dim, eps=NORM_EPS)

    def forward(self, sequence: JaggedSequence) -> JaggedSequence:
        sequence.require_events_only("SASRec")
        attend = partial(
            softmax_attention,
            offsets_B1=sequence.offsets_B1,
            max_length=sequence.max_length,
            dropout=self.dropout if self.training else 0.0,
        )
        x_TD = sequence.values_TD
        for layer in self.layers:
            x_TD = layer(x_TD, attend)
        return sequence.with_values(self.last_norm(x_TD))


class SASRecLayer(nn.Module):
    """y = norm(x) + attention(norm(x), x, x); norm(y) + W2 relu(W1 norm(y))."""

    def __init__(self, config: SASRecConfig, dim: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.width = config.heads, config.dropout, dim // config.heads
        self.attention_norm = Norm(dim, eps=NORM_EPS)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.ffn_norm = Norm(dim, eps=NORM_EPS)
        self.ffn_in = nn.Linear(dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.query, self.key_value, self.attention_output, self.ffn_in, self.ffn_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        normed_TD = self.attention_norm(x_TD)
        a_THQ = attend(self.query(normed_TD).unflatten(-1, (self.heads, -1)), *self.keys(x_TD))
        y_TD = normed_TD + self._drop(self.attention_output(a_THQ.flatten(1)))
        y_TD = self.ffn_norm(y_TD)
        return y_TD + self._drop(self.ffn_out(self._drop(F.relu(self.ffn_in(y_TD)))))

    def keys(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [T, H, Q] each; Q = D / H."""
        k_THQ, v_THQ = (t.unflatten(-1, (self.heads, -1)) for t in self.key_value(x_TD).chunk(2, dim=-1))
        return k_THQ, v_THQ

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)

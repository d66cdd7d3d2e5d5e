"""The Transformer of Llama 2 (arXiv 2307.09288, section 2.2) on packed sequences.

T packed tokens, B sequences, D model width, H query heads, G key and value heads, Q width per head, N tokens that a
cache has room for, L layers. Parameters are named as in Hugging Face's LlamaModel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.config.towers import LlamaConfig
from gr.ops.backend import fuses_layers
from gr.ops.dropout import dropout
from gr.ops.hstu_attention import AttentionMask
from gr.ops.norm_linear import norm_linear
from gr.ops.norm_swiglu import norm_swiglu
from gr.ops.rms_norm import rms_norm
from gr.ops.rope import places, rope_tables, rotate
from gr.ops.softmax_attention import softmax_attention
from gr.ops.swiglu import swiglu
from gr.sequence import JaggedSequence

INIT_STD = 0.02
FEWEST_FUSED = 64  # tokens, a block of rows of the joint operators

# (q_THQ, k_TGQ, v_TGQ) -> [T, H, Q]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KVCache:
    """The keys and values of tokens that the tower has read, so that the next ones are computed alone.

    keys_LBNGQ, values_LBNGQ: what lies from lengths_B on has no meaning. lengths_B: int64, tokens of each sequence.
    """

    keys_LBNGQ: Tensor
    values_LBNGQ: Tensor
    lengths_B: Tensor


class Llama(nn.Module):
    """A residual stack of identical layers, for sequences with a contextual prefix and candidates (both optional).

    A candidate's output depends on the history and on itself, never on another candidate; its place is the one after
    the history. With a contextual prefix, which sees the whole history, the outputs of the history depend on its own
    later tokens: only those of the candidates then predict anything.
    """

    def __init__(self, config: LlamaConfig, *, dim: int, max_length: int) -> None:
        super().__init__()
        self.config, self.width = config, dim // config.heads
        self.layers = nn.ModuleList(LlamaLayer(config, dim) for _ in range(config.layers))
        self.norm = RMSNorm(dim, eps=config.norm_eps)

    def forward(self, sequence: JaggedSequence) -> JaggedSequence:
        return self._read(sequence, [_packed_attention(sequence)] * len(self.layers))

    def prefill(self, sequence: JaggedSequence, capacity: int) -> tuple[JaggedSequence, KVCache]:
        """forward(sequence), and the cache of its events with room for sequences of `capacity` tokens.

        Raises ValueError where a sequence is longer than that, or has candidates or a contextual prefix.
        """
        sequence.require_events_only("KVCache")
        x_TD, lengths_B = sequence.values_TD, sequence.offsets_B1.diff()
        if capacity < sequence.max_length:
            raise ValueError(f"capacity={capacity} is less than the {sequence.max_length} tokens of a sequence")
        shape = (len(self.layers), len(lengths_B), capacity, self.config.key_heads, self.width)
        cache = KVCache(x_TD.new_zeros(shape), x_TD.new_zeros(shape), lengths_B)
        example_T = torch.arange(len(lengths_B), device=x_TD.device).repeat_interleave(lengths_B)
        place = example_T, places(sequence.offsets_B1, len(x_TD))

        def keep(layer: int, q_THQ: Tensor, k_TGQ: Tensor, v_TGQ: Tensor) -> Tensor:
            cache.keys_LBNGQ[layer].index_put_(place, k_TGQ)
            cache.values_LBNGQ[layer].index_put_(place, v_TGQ)
            return _packed_attention(sequence)(q_THQ, k_TGQ, v_TGQ)

        return self._read(sequence, [partial(keep, layer) for layer in range(len(self.layers))]), cache

    def decode(self, x_BD: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """The output of one more token of each sequence, [B, D], and the cache with it.

        The tensors of `cache` are written in place. Raises ValueError where it has no room (read on CPU only).
        """
        if x_BD.device.type == "cpu" and bool((cache.lengths_B >= cache.keys_LBNGQ.shape[2]).any()):
            raise ValueError(
                f"the cache has room for {cache.keys_LBNGQ.shape[2]} tokens of a sequence, and one is full"
            )
        example_B = torch.arange(len(x_BD), device=x_BD.device)
        seen_B11N = (example_B.new_ones(cache.keys_LBNGQ.shape[2]).cumsum(0) - 1 <= cache.lengths_B[:, None])[
            :, None, None
        ]

        def attend(layer: int, q_BHQ: Tensor, k_BGQ: Tensor, v_BGQ: Tensor) -> Tensor:
            keys_BNGQ, values_BNGQ = cache.keys_LBNGQ[layer], cache.values_LBNGQ[layer]
            keys_BNGQ[example_B, cache.lengths_B], values_BNGQ[example_B, cache.lengths_B] = k_BGQ, v_BGQ
            k_BGNQ, v_BGNQ = keys_BNGQ.transpose(1, 2), values_BNGQ.transpose(1, 2)
            return F.scaled_dot_product_attention(
                q_BHQ[:, :, None], k_BGNQ, v_BGNQ, attn_mask=seen_B11N, enable_gqa=True
            )[:, :, 0]

        attends = [partial(attend, layer) for layer in range(len(self.layers))]
        return self._layers(x_BD, cache.lengths_B, attends), replace(cache, lengths_B=cache.lengths_B + 1)

    def _read(self, sequence: JaggedSequence, attends: Sequence[Attend]) -> JaggedSequence:
        place_T = places(sequence.offsets_B1, len(sequence.values_TD), sequence.num_targets_B)
        return sequence.with_values(self._layers(sequence.values_TD, place_T, attends))

    def _layers(self, x_TD: Tensor, place_T: Tensor, attends: Sequence[Attend]) -> Tensor:
        """attends: the attention of each layer."""
        turn = rope_tables(place_T, self.width, self.config.rope_theta, x_TD.dtype)
        for layer, attend in zip(self.layers, attends, strict=True):
            x_TD = layer(x_TD, turn, attend)
        return self.norm(x_TD)


def _packed_attention(sequence: JaggedSequence) -> Attend:
    mask = AttentionMask(num_targets_B=sequence.num_targets_B, contextual_len=sequence.contextual_len)
    return partial(softmax_attention, offsets_B1=sequence.offsets_B1, max_length=sequence.max_length, mask=mask)


class RMSNorm(nn.RMSNorm):
    """torch's, computed in few passes on CPU."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LlamaLayer(nn.Module):
    """y = x + attention(norm(x)); y + feed-forward(norm(y))."""

    def __init__(self, config: LlamaConfig, dim: int) -> None:
        super().__init__()
        self.dropout, self.eps = config.dropout, config.norm_eps
        self.input_layernorm = RMSNorm(dim, eps=config.norm_eps)
        self.self_attn = LlamaAttention(config, dim)
        self.post_attention_layernorm = RMSNorm(dim, eps=config.norm_eps)
        self.mlp = SwiGLU(dim, config.ffn_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)

    def forward(self, x_TD: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        if not self._fuses(x_TD):
            x_TD = x_TD + self._drop(self.self_attn(self.input_layernorm(x_TD), turn, attend))
            return x_TD + self._drop(self.mlp(self.post_attention_layernorm(x_TD)))
        projections = [each.weight for each in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)]
        parts = norm_linear(
            x_TD,
            torch.cat([weight.T for weight in projections], dim=1),
            norm_weight_D=self.input_layernorm.weight,
            eps=self.eps,
            norm="rms",
            splits=[len(weight) for weight in projections],
        )
        heads_TD, out = self.self_attn.attend(parts, turn, attend), self.self_attn.o_proj.weight.T
        drops = bool(self.dropout) and self.training
        (y_TD,) = norm_linear(
            heads_TD, out, eps=self.eps, norm="none", splits=[x_TD.shape[1]], residual_TO=None if drops else x_TD
        )
        y_TD = x_TD + self._drop(y_TD) if drops else y_TD
        mlp, norm = self.mlp, self.post_attention_layernorm.weight
        weights = norm, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        added_TD = norm_swiglu(y_TD, *weights, self.eps, residual=not drops)
        return y_TD + self._drop(added_TD) if drops else added_TD

    def _fuses(self, x_TD: Tensor) -> bool:
        """Whether joint operators of a whole half of the layer compute it, with weights laid side by side at each call.

        Of few tokens, as when they are decoded, that would take longer than the products. A part of a matrix, under
        tensor parallelism, is multiplied by its own module.
        """
        # The length comes last: one that Python has looked at is a constant of what is exported.
        whole = all(type(each) is nn.Parameter for each in self.parameters())
        return whole and fuses_layers(x_TD, 3 * self.mlp.gate_proj.weight.numel()) and len(x_TD) >= FEWEST_FUSED

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


class LlamaAttention(nn.Module):
    """W_o attention(turned W_q x, turned W_k x, W_v x), with H heads of queries and G of keys and values."""

    def __init__(self, config: LlamaConfig, dim: int) -> None:
        super().__init__()
        self.width = dim // config.heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, config.key_heads * self.width, bias=False)
        self.v_proj = nn.Linear(dim, config.key_heads * self.width, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_TD: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        return self.o_proj(self.attend((self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)), turn, attend))

    def attend(self, parts: tuple[Tensor, ...], turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Attention alone, [T, D]. parts: queries, keys and values, not yet turned."""
        return attend(*self.turned(parts, turn)).flatten(1)

    def turned(self, parts: tuple[Tensor, ...], turn: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Queries [T, H, Q] and keys [T, G, Q], turned, and values [T, G, Q]."""
        q_THQ, k_TGQ, v_TGQ = (self._heads(part) for part in parts)
        # Under autocast the tables are float32, and q and k as v.
        return *(rotate(each, *turn).to(v_TGQ.dtype) for each in (q_THQ, k_TGQ)), v_TGQ

    def keys(self, x_TD: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values, [T, G, Q] each."""
        k_TGQ, v_TGQ = self._heads(self.k_proj(x_TD)), self._heads(self.v_proj(x_TD))
        return rotate(k_TGQ, *turn).to(v_TGQ.dtype), v_TGQ

    def _heads(self, part_TO: Tensor) -> Tensor:
        """The tensor split into as many heads as its columns make: under tensor parallelism a rank has some of them."""
        return part_TO.unflatten(-1, (-1, self.width))


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))

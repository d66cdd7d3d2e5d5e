"""Softmax attention on packed sequences, with keys and values that several heads may share.

T packed tokens, B sequences, H query heads, G key and value heads, Q and V widths per head, N padded length.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from gr.ops.backend import backend_for
from gr.ops.dropout import dropout as dropout_op
from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.jagged import check_offsets, jagged_to_padded, padded_to_jagged
from gr.ops.softmax_attention.native import softmax_attention_native

__all__ = ["softmax_attention"]


def softmax_attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    offsets_B1: Tensor,
    *,
    max_length: int,
    mask: AttentionMask | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """out_i = sum over the keys j that i sees, of the same sequence, of softmax_j(q_i . k_j / sqrt(Q)) v_j.

    q_THQ [T, H, Q], k_TGQ [T, G, Q], v_TGV [T, G, V]: one float dtype. G divides H: query head h reads key and value
    head h // (H / G) (grouped-query attention; multi-query with G = 1).
    offsets_B1: int64 [B + 1]; empty sequences are fine. max_length: no sequence is longer, in tokens.
    mask: the keys that a query sees, where these are not all j <= i; as hstu_attention takes it.
    dropout: probability that an attention weight is zeroed.
    Returns [T, H, V]. Gradients: q, k, v.
    On CPU C++ computes it, with the same bits on any number of threads, whatever the other sequences of the batch. On
    CUDA, half precision over the past alone is computed by torch's kernel for packed sequences
    (torch.nn.attention.varlen). All else, and float64, is computed on padded tensors, by torch's
    scaled_dot_product_attention if there is no dropout.
    Raises ValueError if shapes or lengths do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), Eq. 1, masked to the past; Ainslie et al. 2023 (arXiv 2305.13245).
    """
    _check(q_THQ, k_TGQ, v_TGV)
    tokens = q_THQ.shape[0]
    check_offsets(offsets_B1, tokens, max_length)
    if mask is not None:
        mask.check(offsets_B1)
        mask = None if mask.causal else mask
    if tokens == 0:
        # Empty, but connected to the graph: DDP waits for the gradient of every parameter, also without tokens.
        return v_TGV.new_zeros(0, q_THQ.shape[1], v_TGV.shape[2]) + (q_THQ.sum() + k_TGQ.sum() + v_TGV.sum())
    values = (q_THQ, k_TGQ, v_TGV)
    if _packed_kernel_computes(values, mask, dropout):
        # A window that reaches back without end, and not ahead, is the causal rule.
        cumulative = offsets_B1.int()
        out = varlen_attn(*values, cumulative, cumulative, max_length, max_length, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, Tensor)  # the pair with the sums of exponentials was not asked for
        return out
    if q_THQ.dtype != torch.float64 and backend_for(q_THQ.device) == "native":
        return softmax_attention_native(values, offsets_B1, mask, dropout)
    return _padded(values, offsets_B1, max_length, mask, dropout)


def _check(q_THQ: Tensor, k_TGQ: Tensor, v_TGV: Tensor) -> None:
    if q_THQ.dim() != 3 or k_TGQ.dim() != 3 or k_TGQ.shape[::2] != q_THQ.shape[::2]:
        raise ValueError(
            f"q_THQ and k_TGQ must be [T, H, Q] and [T, G, Q], not {list(q_THQ.shape)} and {list(k_TGQ.shape)}"
        )
    heads, groups = q_THQ.shape[1], k_TGQ.shape[1]
    if not groups or heads % groups:
        raise ValueError(f"k_TGQ has {groups} heads, which do not divide the {heads} of q_THQ")
    if v_TGV.dim() != 3 or v_TGV.shape[:2] != k_TGQ.shape[:2]:
        raise ValueError(f"v_TGV must be [T, G, V] with [T, G] = {list(k_TGQ.shape[:2])}, not {list(v_TGV.shape)}")


def _packed_kernel_computes(values: tuple[Tensor, ...], mask: AttentionMask | None, dropout: float) -> bool:
    """Whether torch's kernel for packed sequences, FlashAttention, has this device, dtype and these widths."""
    q_THQ, _, v_TGV = values
    width = q_THQ.shape[2]
    plain = mask is None and not dropout and q_THQ.dtype in (torch.float16, torch.bfloat16)
    fits = width == v_TGV.shape[2] and width <= 256 and width % 8 == 0
    return q_THQ.is_cuda and plain and fits and torch.cuda.get_device_capability(q_THQ.device) >= (8, 0)


def _padded(
    values: tuple[Tensor, Tensor, Tensor], offsets_B1: Tensor, longest: int, mask: AttentionMask | None, dropout: float
) -> Tensor:
    """_attend for all sequences, padded to `longest` tokens."""
    padded = tuple(jagged_to_padded(x, offsets_B1, longest) for x in values)
    return padded_to_jagged(_attend(padded, _seen(mask, offsets_B1, longest), dropout), offsets_B1, len(values[0]))


def _seen(mask: AttentionMask | None, offsets_B1: Tensor, longest: int) -> Tensor | None:
    """bool [B, 1, N, N], None for the causal rule."""
    if mask is None:
        return None
    history_B = offsets_B1.diff()
    if mask.num_targets_B is not None:
        history_B = history_B - mask.num_targets_B
    return mask.seen(longest, history_B)[:, None]


def _attend(padded: tuple[Tensor, ...], seen_B1NN: Tensor | None, dropout: float) -> Tensor:
    """[B, N, H, V], of q [B, N, H, Q], k and v [B, N, G, Q or V]."""
    q, k, v = (x.transpose(1, 2) for x in padded)
    # Without a mask, padding follows the end of a sequence, so the causal rule hides it from every query before it.
    if dropout:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = dropout_op(_weights(q, k, seen_B1NN), dropout, training=True) @ v
    else:
        causal = seen_B1NN is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B1NN, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def _weights(q_BHNQ: Tensor, k_BHNQ: Tensor, seen_B1NN: Tensor | None) -> Tensor:
    """[B, H, N, N]. torch's fused kernel has no dropout on CPU, so the weights are made in full."""
    N, width = q_BHNQ.shape[2:]
    if seen_B1NN is None:
        seen_B1NN = torch.ones(N, N, dtype=torch.bool, device=q_BHNQ.device).tril()
    scores = (q_BHNQ * width**-0.5) @ k_BHNQ.transpose(2, 3)
    return scores.masked_fill_(~seen_B1NN, -torch.inf).softmax(dim=-1)

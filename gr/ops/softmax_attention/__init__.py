"""Softmax attention on packed sequences, with keys and values that several heads may share.

T packed tokens, B sequences, H query heads, G key and value heads, Q and V widths per head, N padded length.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.dropout import dropout as dropout_op
from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.jagged import check_offsets, jagged_to_padded, padded_to_jagged, permuted

__all__ = ["softmax_attention"]

# Sequences whose lengths round up to the same multiple are padded together: 16 took least time of 1, 8, 16 and 32.
LENGTH_STEP = 16


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
    The computation is on padded tensors, by torch's scaled_dot_product_attention if there is no dropout; on CPU,
    sequences of similar lengths are padded together.
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
    if offsets_B1.device.type != "cpu":  # reading lengths from a device would stop its queue
        return _padded(values, offsets_B1, max_length, mask, dropout)
    return _by_length(values, offsets_B1, mask, dropout)


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


def _by_length(
    values: tuple[Tensor, Tensor, Tensor], offsets_B1: Tensor, mask: AttentionMask | None, dropout: float
) -> Tensor:
    """_padded for each set of sequences of similar lengths, so that short ones are not padded to the longest."""
    lengths_B, order_B = offsets_B1.diff().sort(stable=True)
    _, counts = torch.unique_consecutive(-(-lengths_B // LENGTH_STEP), return_counts=True)
    starts_B = offsets_B1[order_B]
    sorted_B1 = F.pad(lengths_B.cumsum(0), (1, 0))
    tokens = values[0].shape[0]
    order_T = torch.arange(tokens) + (starts_B - sorted_B1[:-1]).repeat_interleave(lengths_B, output_size=tokens)
    ends = counts.cumsum(0).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    sizes = [int(sorted_B1[stop] - sorted_B1[start]) for start, stop in bounds]
    sorted_values = (permuted(x, order_T).split(sizes) for x in values)
    targets_B = None if mask is None or mask.num_targets_B is None else mask.num_targets_B[order_B]
    outputs = []
    for (start, stop), own in zip(bounds, zip(*sorted_values, strict=True), strict=True):
        of_group = mask
        if mask is not None and targets_B is not None:
            of_group = replace(mask, num_targets_B=targets_B[start:stop])
        longest = int(lengths_B[stop - 1])
        if longest:
            offsets = sorted_B1[start : stop + 1] - sorted_B1[start]
            outputs.append(_padded(own, offsets, longest, of_group, dropout))
    return permuted(torch.cat(outputs), order_T.argsort())


def _padded(
    values: tuple[Tensor, ...], offsets_B1: Tensor, longest: int, mask: AttentionMask | None, dropout: float
) -> Tensor:
    """The attention of sequences of at most `longest` tokens, each padded to that length."""
    q, k, v = (jagged_to_padded(x, offsets_B1, longest).transpose(1, 2) for x in values)
    seen_B1NN = None
    if mask is not None:
        history_B = offsets_B1.diff()
        if mask.num_targets_B is not None:
            history_B = history_B - mask.num_targets_B
        seen_B1NN = mask.seen(longest, history_B)[:, None]
    # Without a mask, padding follows the end of a sequence, so the causal rule hides it from every query before it.
    if dropout:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = dropout_op(_weights(q, k, seen_B1NN), dropout, training=True) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B1NN, is_causal=mask is None, enable_gqa=True)
    return padded_to_jagged(out.transpose(1, 2), offsets_B1, values[0].shape[0])


def _weights(q_BHNQ: Tensor, k_BHNQ: Tensor, seen_B1NN: Tensor | None) -> Tensor:
    """[B, H, N, N]. torch's fused kernel has no dropout on CPU, so the weights are made in full."""
    N, width = q_BHNQ.shape[2:]
    if seen_B1NN is None:
        seen_B1NN = torch.ones(N, N, dtype=torch.bool, device=q_BHNQ.device).tril()
    scores = (q_BHNQ * width**-0.5) @ k_BHNQ.transpose(2, 3)
    return scores.masked_fill_(~seen_B1NN, -torch.inf).softmax(dim=-1)

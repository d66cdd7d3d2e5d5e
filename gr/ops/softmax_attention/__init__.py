"""Causal softmax attention on packed sequences. T packed tokens, B examples, H heads, Q and V widths per head."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.dropout import dropout as dropout_op
from gr.ops.jagged import check_offsets, jagged_to_padded, padded_to_jagged

__all__ = ["softmax_attention"]


def softmax_attention(
    q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, offsets_B1: Tensor, *, max_length: int, dropout: float = 0.0
) -> Tensor:
    """out_i = sum over j <= i of the same sequence of softmax_j(q_i . k_j / sqrt(Q)) v_j.

    q_THQ, k_THQ [T, H, Q], v_THV [T, H, V]: one float dtype. offsets_B1: int64 [B + 1]; empty sequences are fine.
    max_length: no sequence is longer, in tokens. dropout: probability that an attention weight is zeroed.
    Returns [T, H, V]. Gradients: q, k, v.
    The computation is on padded tensors, by torch's scaled_dot_product_attention if there is no dropout.
    Raises ValueError if shapes or lengths do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), Eq. 1, masked to the past.
    """
    if q_THQ.dim() != 3 or k_THQ.shape != q_THQ.shape:
        raise ValueError(f"q_THQ and k_THQ must be [T, H, Q] alike, not {list(q_THQ.shape)} and {list(k_THQ.shape)}")
    if v_THV.dim() != 3 or v_THV.shape[:2] != q_THQ.shape[:2]:
        raise ValueError(f"v_THV must be [T, H, V] with [T, H] = {list(q_THQ.shape[:2])}, not {list(v_THV.shape)}")
    tokens = q_THQ.shape[0]
    check_offsets(offsets_B1, tokens, max_length)
    if tokens == 0:
        # Empty, but connected to the graph: DDP waits for the gradient of every parameter, also without tokens.
        return v_THV + (q_THQ.sum() + k_THQ.sum())
    # Padding to the longest sequence of the batch saves work; reading its length from a device would stop the queue.
    longest = int(offsets_B1.diff().max()) if offsets_B1.device.type == "cpu" else max_length
    q, k, v = (jagged_to_padded(x, offsets_B1, longest).transpose(1, 2) for x in (q_THQ, k_THQ, v_THV))
    # Padding follows the end of a sequence, so the causal mask hides it from every query before the end.
    if dropout:
        out = dropout_op(_causal_weights(q, k), dropout, training=True) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return padded_to_jagged(out.transpose(1, 2), offsets_B1, tokens)


def _causal_weights(q_BHNQ: Tensor, k_BHNQ: Tensor) -> Tensor:
    """[B, H, N, N]. torch's fused kernel has no dropout on CPU, so the weights are made in full."""
    N, width = q_BHNQ.shape[2:]
    later = torch.ones(N, N, dtype=torch.bool, device=q_BHNQ.device).triu(1)
    scores = (q_BHNQ * width**-0.5) @ k_BHNQ.transpose(2, 3)
    return scores.masked_fill_(later, -torch.inf).softmax(dim=-1)

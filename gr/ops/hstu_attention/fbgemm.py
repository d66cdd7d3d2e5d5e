"""HSTU attention by FBGEMM's CUTLASS kernels, where they are installed. Letters as in reference.py.

Their definition is ours but for the divisor, which is max_length for every row: the output is multiplied by
max_length / divisor, and so rounded twice. What they have no form of is an error, never another implementation.
Translated from the sources of fbgemm 1.3 to 1.8 and of its main branch of August 2026; not run on a GPU yet.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.ops import fbgemm
from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.hstu_attention.time_buckets import TimeBuckets

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (32, 64, 128, 256)


def hstu_attention_fbgemm(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    offsets_B1: Tensor,
    *,
    max_length: int,
    scale_T: Tensor,
    alpha: float = 1.0,
    mask: AttentionMask | None = None,
    output: Tensor | None = None,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    time_buckets: TimeBuckets | None = None,
) -> Tensor:
    """As hstu_attention_reference, in bfloat16 or float16, for Q = V of 32, 64, 128 or 256, without biases.

    Gradients of q are sums of atomic additions: not the same bits every time. output is not used.
    Raises ValueError for what the kernels do not have: the rest, and a window beside candidates or a prefix.
    """
    mask = mask or AttentionMask()
    _check(q_THQ, v_THV, mask, position_bias, time_bias)
    if q_THQ.shape[0] == 0:
        return q_THQ * k_THQ * v_THV  # no tokens, and gradients all the same
    targets_B = mask.num_targets_B
    lengths_B = offsets_B1.diff()
    bounds_B1 = offsets_B1.to(torch.int32)
    out_THV = fbgemm.load()(
        _aligned(q_THQ),
        _aligned(k_THQ),
        _aligned(v_THV),
        bounds_B1,
        bounds_B1,
        max_seqlen_q=max_length,
        max_seqlen_k=max_length,
        # An empty sequence has no prefix.
        num_contexts=lengths_B.clamp(max=mask.contextual_len).to(torch.int32) if mask.contextual_len else None,
        num_targets=None if targets_B is None else targets_B.to(torch.int32).contiguous(),
        window_size=(mask.max_attn_len or -1, 0),
        alpha=alpha,
    )
    return _Scaled.apply(out_THV, max_length * scale_T[:, None, None])


def _check(
    q_THQ: Tensor, v_THV: Tensor, mask: AttentionMask, position_bias: Tensor | None, time_bias: Tensor | None
) -> None:
    widths, window = (q_THQ.shape[2], v_THV.shape[2]), mask.max_attn_len
    for wrong, problem in (
        (position_bias is not None, "position_bias is not among what it has"),
        (time_bias is not None, "time_bias is not among what it has"),
        (
            q_THQ.dtype not in DTYPES,
            f"q_THQ must be bfloat16 or float16, not {q_THQ.dtype}: set trainer.precision: bf16",
        ),
        (
            widths[0] != widths[1] or widths[0] not in WIDTHS,
            f"q_THQ and v_THV must be equally wide, 32, 64, 128 or 256 a head, not {widths[0]} and {widths[1]}",
        ),
        (window and mask.num_targets_B is not None, "max_attn_len does not combine with num_targets_B"),
        (window and mask.contextual_len, "max_attn_len does not combine with contextual_len"),
        (window and mask.min_full_attn_seq_len, "max_attn_len does not combine with min_full_attn_seq_len"),
    ):
        if wrong:
            raise ValueError(f"HSTU attention by fbgemm: {problem}; or use trainer.kernels: triton")


def _aligned(x_THD: Tensor) -> Tensor:
    """x, or a copy where its rows do not start at multiples of 16 bytes, which is how the kernels load them."""
    rows, heads, columns = x_THD.stride()
    fits = columns == 1 and all(s > 0 and s % 8 == 0 for s in (rows, heads)) and x_THD.data_ptr() % 16 == 0
    return x_THD if fits else x_THD.clone(memory_format=torch.contiguous_format)


class _Scaled(torch.autograd.Function):
    """x times a factor a row. The gradient is packed: the kernels refuse one whose columns are apart."""

    @staticmethod
    def forward(ctx: Any, x_THV: Tensor, factor_T11: Tensor) -> Tensor:
        ctx.save_for_backward(factor_T11)
        return torch.mul(x_THV, factor_T11, out=x_THV.new_empty(x_THV.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THV: Tensor) -> tuple[Tensor, None]:
        (factor_T11,) = ctx.saved_tensors
        return torch.mul(grad_THV, factor_T11, out=grad_THV.new_empty(grad_THV.shape)), None

"""HSTU attention by the C++ operator, with its gradients. Letters as in reference.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.hstu_attention.time_buckets import TimeBuckets


def native_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the operator computes in: bfloat16 where the CPU has AMX, else float32.

    Without AVX512-BF16 torch has no bfloat16 products at all; with it but without AMX they are no faster than float32
    ones, and the tiles of scores still have to be converted: float32 took 0.75 of the time.
    """
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def hstu_attention_native(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    offsets_B1: Tensor,
    *,
    scale_T: Tensor,
    alpha: float = 1.0,
    mask: AttentionMask | None = None,
    output: Tensor | None = None,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    time_buckets: TimeBuckets | None = None,
) -> Tensor:
    """As hstu_attention_reference, for float32 and bfloat16 on CPU; the same bits on any number of threads.

    output: what an earlier call with the same arguments returned, which is then not computed again.
    """
    mask = AttentionMask() if mask is None else mask
    position = None if position_bias is None else position_bias.float().contiguous()
    time = None if time_bias is None else time_bias.float().contiguous()
    fixed = (
        offsets_B1.contiguous(),
        scale_T.float().contiguous(),
        None if time_buckets is None else time_buckets.ids_P,
        None if time_buckets is None else time_buckets.pair_offsets_B1,
        None if mask.num_targets_B is None else mask.num_targets_B.contiguous(),
    )
    numbers = (alpha, mask.max_attn_len, mask.contextual_len, mask.min_full_attn_seq_len)
    return _Native.apply(q_THQ, k_THQ, v_THV, position, time, fixed, numbers, output)


def _operand(x_THD: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows and heads may be strided, as in views of one UVQK buffer; the elements of a head must be neighbours."""
    x_THD = x_THD.to(dtype)
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()


def _call(op: Any, operands: Sequence[Tensor], saved: Sequence[Tensor | None], numbers: tuple[float, ...]) -> Any:
    position, time, offsets_B1, scale_T, ids_P, pair_offsets_B1, num_targets_B = saved
    alpha, *lengths = numbers
    tables = (position, time, ids_P, pair_offsets_B1)
    return op(*operands, offsets_B1, scale_T, *tables, alpha, num_targets_B, *lengths)


class _Native(torch.autograd.Function):
    """Keeps q, k and v as they were given: no copy of another dtype or layout lives until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        fixed: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        output: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time, *fixed)
        ctx.numbers = numbers
        if output is not None:
            return output.view_as(output)
        operands = [_operand(x, native_dtype(q.dtype)) for x in (q, k, v)]
        return _call(torch.ops.gr.hstu_attention, operands, (position, time, *fixed), numbers).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *others = ctx.saved_tensors
        operands = [_operand(x, native_dtype(q.dtype)) for x in (grad, q, k, v)]
        *dvalues, dposition, dtime = _call(torch.ops.gr.hstu_attention_backward, operands, others, ctx.numbers)
        dtables = (None if x is None else dx.to(x.dtype) for x, dx in zip(others[:2], (dposition, dtime), strict=True))
        return *(dx.to(q.dtype) for dx in dvalues), *dtables, None, None, None

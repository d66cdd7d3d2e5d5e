"""HSTU attention by the C++ operator, with its gradients. Letters as in reference.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    time_buckets: TimeBuckets | None = None,
) -> Tensor:
    """As hstu_attention_reference, for float32 and bfloat16 on CPU; the same bits on any number of threads."""
    dtype = native_dtype(q_THQ.dtype)
    position = None if position_bias is None else position_bias.float().contiguous()
    time = None if time_bias is None else time_bias.float().contiguous()
    ids_P = None if time_buckets is None else time_buckets.ids_P
    pair_offsets_B1 = None if time_buckets is None else time_buckets.pair_offsets_B1
    out_THV = _Native.apply(
        q_THQ.to(dtype),
        k_THQ.to(dtype),
        v_THV.to(dtype),
        position,
        time,
        offsets_B1.contiguous(),
        scale_T.float().contiguous(),
        ids_P,
        pair_offsets_B1,
    )
    return out_THV.to(q_THQ.dtype)


def _with_dense_rows(x_THD: Tensor) -> Tensor:
    """Rows and heads may be strided, as in views of one UVQK buffer; the elements of a head must be neighbours."""
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        offsets_B1: Tensor,
        scale_T: Tensor,
        ids_P: Tensor | None,
        pair_offsets_B1: Tensor | None,
    ) -> Tensor:
        q, k, v = (_with_dense_rows(x) for x in (q, k, v))
        ctx.save_for_backward(q, k, v, offsets_B1, scale_T, position, time, ids_P, pair_offsets_B1)
        return torch.ops.gr.hstu_attention(q, k, v, offsets_B1, scale_T, position, time, ids_P, pair_offsets_B1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        position, time = saved[5], saved[6]
        dq, dk, dv, dposition, dtime = torch.ops.gr.hstu_attention_backward(_with_dense_rows(grad), *saved)
        return (
            dq,
            dk,
            dv,
            None if position is None else dposition.to(position.dtype),
            None if time is None else dtime.to(time.dtype),
            *(None,) * 4,
        )

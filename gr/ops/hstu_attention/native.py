"""HSTU attention by the C++ operator, with its gradients. Letters as in reference.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.ops.hstu_attention.call import AttentionCall, Operands


def native_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the operator computes in: bfloat16 for bfloat16 where the CPU has AMX, else float32.

    Without AVX512-BF16 torch has no bfloat16 products at all. With it but without AMX they are no faster than float32
    products, and the tiles of scores still have to be converted: float32 took 0.75 of the time.
    """
    whole_set = torch.backends.cpu.get_cpu_capability() == "AVX512"  # ATEN_CPU_CAPABILITY may allow torch less
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and whole_set:
        return torch.bfloat16
    return torch.float32


def hstu_attention_native(operands: Operands, call: AttentionCall) -> Tensor:
    """hstu_attention_reference for float32 and half precisions on CPU; the same bits on any number of threads."""
    buckets, targets_B = call.time_buckets, call.mask.num_targets_B
    index_tensors = (
        None if buckets is None else buckets.ids_P,
        None if buckets is None else buckets.pair_offsets_B1,
        None if targets_B is None else targets_B.contiguous(),
    )
    return _Native.apply(*operands, index_tensors, call)


def native_operand(x_THD: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows and heads may be strided, as in views of one UVQK buffer; the elements of a head must be neighbours."""
    x_THD = x_THD.to(dtype)
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()


def _run(op: Any, operands: Sequence[Tensor], saved: Sequence[Tensor | None], call: AttentionCall) -> Any:
    position, time, ids_P, pair_offsets_B1, num_targets_B = saved
    tables = (position, time, ids_P, pair_offsets_B1)
    lengths = (call.mask.max_attn_len, call.mask.contextual_len, call.mask.min_full_attn_seq_len)
    return op(*operands, call.offsets_B1, call.scale_T, *tables, call.alpha, num_targets_B, *lengths)


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
        output: Tensor | None,
        index_tensors: tuple[Tensor | None, ...],
        call: AttentionCall,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time, *index_tensors)
        ctx.call = call
        if output is not None:
            return output.view_as(output)
        operands = [native_operand(x, native_dtype(q.dtype)) for x in (q, k, v)]
        return _run(torch.ops.gr.hstu_attention, operands, (position, time, *index_tensors), call).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        operands = [native_operand(x, native_dtype(q.dtype)) for x in (grad, q, k, v)]
        *dvalues, dposition, dtime = _run(torch.ops.gr.hstu_attention_backward, operands, saved, ctx.call)
        dtables = (None if x is None else dx.to(x.dtype) for x, dx in zip(saved[:2], (dposition, dtime), strict=True))
        return *(dx.to(q.dtype) for dx in dvalues), *dtables, None, None, None

"""Softmax attention by the C++ operator, with its gradients. Letters as in __init__.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.hstu_attention.native import native_operand


def softmax_attention_native(
    values: tuple[Tensor, Tensor, Tensor], offsets_B1: Tensor, mask: AttentionMask | None, dropout: float
) -> Tensor:
    """softmax_attention for float32 and half precisions on CPU; the same bits on any number of threads.

    The dropout mask is a function of a seed that torch's generator draws, of the query, its head and the key's place.
    """
    mask = mask or AttentionMask()
    seed = int(torch.randint(1 << 31, ())) if dropout else 0
    lengths = (mask.max_attn_len, mask.contextual_len, mask.min_full_attn_seq_len)
    targets_B = None if mask.num_targets_B is None else mask.num_targets_B.contiguous()
    return _Native.apply(*values, offsets_B1.contiguous(), targets_B, (*lengths, dropout, seed))


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets_B1: Tensor,
        targets_B: Tensor | None,
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.alpha, ctx.settings = q.shape[2] ** -0.5, settings
        operands = [native_operand(x, torch.float32) for x in (q, k, v)]
        out, logs_TH = torch.ops.gr.softmax_attention(*operands, offsets_B1, ctx.alpha, targets_B, *settings)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, logs_TH, offsets_B1, targets_B)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logs_TH, offsets_B1, targets_B = ctx.saved_tensors
        grad, out, *operands = [native_operand(x, torch.float32) for x in (grad, out, q, k, v)]
        gradients = torch.ops.gr.softmax_attention_backward(
            grad, out, logs_TH, *operands, offsets_B1, ctx.alpha, targets_B, *ctx.settings
        )
        return *(x.to(q.dtype) for x in gradients), None, None, None

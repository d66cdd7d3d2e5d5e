"""Sampled logits and their softmax by the C++ operators, with their gradients. Letters as in reference.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sampled_logits_native(queries_TD: Tensor, items_KD: Tensor, index_TS: Tensor) -> Tensor:
    """sampled_logits_reference on CPU, computed in float32; the same bits on any number of threads."""
    return _Native.apply(queries_TD.float(), items_KD.float(), index_TS.contiguous()).to(queries_TD.dtype)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, index: Tensor) -> Tensor:
        queries, items = queries.contiguous(), items.contiguous()
        ctx.save_for_backward(queries, items, index)
        return torch.ops.gr.sampled_logits(queries, items, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dqueries, ditems = torch.ops.gr.sampled_logits_backward(grad.contiguous(), *ctx.saved_tensors)
        return dqueries, ditems, None


def sampled_softmax_native(
    queries_TD: Tensor, items_KD: Tensor, positive_T: Tensor, negative_TS: Tensor, scale: float
) -> Tensor:
    """sampled_softmax on CPU, computed in float32; the same bits on any number of threads."""
    return _Softmax.apply(
        queries_TD.float(), items_KD.float(), positive_T.contiguous(), negative_TS.contiguous(), scale
    )


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        queries, items = queries.contiguous(), items.contiguous()
        with_slopes = any(ctx.needs_input_grad)
        losses, weights, index, slopes = torch.ops.gr.sampled_softmax(
            queries, items, positive, negative, scale, with_slopes
        )
        ctx.save_for_backward(weights, slopes, queries, items, index)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.gr.sampled_softmax_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None

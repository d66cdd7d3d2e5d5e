"""Linear cross-entropy over chunks of tokens. Letters as in reference.py, C tokens of one chunk.

The forward pass keeps one number a token, the log of its partition sum; the backward pass computes the logits
again. Both reuse one [C, K] buffer: fresh [T, K] tensors cost more in page faults than the arithmetic on them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy_chunked(
    queries_TD: Tensor, items_KD: Tensor, target_T: Tensor, *, scale: float, bias_K: Tensor | None, chunk: int
) -> Tensor:
    """linear_cross_entropy_reference, `chunk` tokens at a time."""
    return _Chunked.apply(queries_TD, items_KD, bias_K, target_T, scale, chunk)


def _logits(queries_CD: Tensor, items_KD: Tensor, bias_K: Tensor | None, scale: float, out_CK: Tensor) -> Tensor:
    if bias_K is None:
        return torch.mm(queries_CD * scale, items_KD.T, out=out_CK)
    return torch.addmm(bias_K, queries_CD, items_KD.T, alpha=scale, out=out_CK)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, items: Tensor, bias: Tensor | None, target: Tensor, scale: float, chunk: int
    ) -> Tensor:
        tokens = queries.shape[0]
        loss_T, log_sum_T = queries.new_empty(tokens), queries.new_empty(tokens)
        buffer_CK = queries.new_empty(min(chunk, tokens), items.shape[0])
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            logits_CK = _logits(queries[part], items, bias, scale, buffer_CK[: part.stop - start])
            largest_C1 = logits_CK.amax(1, keepdim=True)
            # Relative to the largest logit, so that a loss near zero keeps its digits.
            at_target_C1 = logits_CK.sub_(largest_C1).gather(1, target[part, None])
            log_sum_C1 = logits_CK.exp_().sum(1, keepdim=True).log_()
            loss_T[part] = (log_sum_C1 - at_target_C1).squeeze(1)
            log_sum_T[part] = (log_sum_C1 + largest_C1).squeeze(1)
        ctx.save_for_backward(queries, items, bias, target, log_sum_T)
        ctx.scale, ctx.chunk = scale, chunk
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, items, bias, target, log_sum_T = ctx.saved_tensors
        tokens, chunk = queries.shape[0], ctx.chunk
        # The gradient of items is summed as [D, K]: the other orientation of this product is a third slower.
        dqueries, ditems_DK = torch.empty_like(queries), items.new_zeros(items.shape[1], items.shape[0])
        dbias = None if bias is None else torch.zeros_like(bias)
        buffer_CK = queries.new_empty(min(chunk, tokens), items.shape[0])
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            # d loss_t / d logits = softmax - one-hot(target)
            dlogits_CK = _logits(queries[part], items, bias, ctx.scale, buffer_CK[: part.stop - start])
            dlogits_CK.sub_(log_sum_T[part, None]).exp_()
            grad_C1 = grad[part, None]
            torch.mm(dlogits_CK, items, out=dqueries[part])
            dqueries[part].sub_(items[target[part]]).mul_(grad_C1)
            ditems_DK.addmm_((queries[part] * grad_C1).T, dlogits_CK)
            if dbias is not None:
                dbias.addmv_(dlogits_CK.T, grad[part])
        ditems = ditems_DK.T.contiguous().index_add_(0, target, queries * grad[:, None], alpha=-1)
        if dbias is not None:
            dbias.index_add_(0, target, grad, alpha=-1)
        return dqueries.mul_(ctx.scale), ditems.mul_(ctx.scale), dbias, None, None, None

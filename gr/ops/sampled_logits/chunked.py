"""Sampled logits in plain torch, a chunk of tokens at a time: never more than a few MB of [T, K] or [T, S, D].

If a token samples a fair share of the items, the product with all items costs less than gathering rows; otherwise rows
are gathered. Letters as in reference.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 20
_ITEMS_PER_SAMPLE = 64  # a gathered row costs about as much as this many rows in a matrix product


def sampled_logits_chunked(queries_TD: Tensor, items_KD: Tensor, index_TS: Tensor) -> Tensor:
    """sampled_logits_reference on any device."""
    return _Chunked.apply(queries_TD, items_KD, index_TS)


def _multiplies_all(items_KD: Tensor, index_TS: Tensor) -> bool:
    return items_KD.shape[0] <= _ITEMS_PER_SAMPLE * index_TS.shape[1]


def _chunks(items_KD: Tensor, index_TS: Tensor) -> Iterator[slice]:
    per_token = items_KD.shape[0] if _multiplies_all(items_KD, index_TS) else index_TS.shape[1] * items_KD.shape[1]
    chunk = max(1, _CHUNK_ELEMENTS // max(1, per_token))
    for start in range(0, index_TS.shape[0], chunk):
        yield slice(start, start + chunk)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(queries, items, index)
        logits = queries.new_empty(index.shape)
        for part in _chunks(items, index):
            if _multiplies_all(items, index):
                logits[part] = (queries[part] @ items.T).gather(1, index[part])
            else:
                logits[part] = torch.bmm(items[index[part]], queries[part][:, :, None]).squeeze(2)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, items, index = ctx.saved_tensors
        dqueries, ditems = torch.empty_like(queries), torch.zeros_like(items)
        for part in _chunks(items, index):
            if _multiplies_all(items, index):
                dense = grad.new_zeros(index[part].shape[0], items.shape[0]).scatter_add_(1, index[part], grad[part])
                dqueries[part] = dense @ items
                ditems.addmm_(dense.T, queries[part])
            else:
                dqueries[part] = torch.bmm(grad[part][:, None, :], items[index[part]]).squeeze(1)
                rows = grad[part][:, :, None] * queries[part][:, None, :]
                ditems.index_add_(0, index[part].flatten(), rows.flatten(0, 1))
        return dqueries, ditems, None

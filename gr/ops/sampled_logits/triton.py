"""Sampled logits in Triton, for CUDA tensors; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests.

A program owns its output: the logits of a token, the gradient of a token, or the gradient of an item. The last reads
its samples from the sorted index, so nothing is added atomically and results are the same bits each time. Letters as in
reference.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = 4096  # the elements of gathered rows in registers at a time
WARPS = 4


@triton.jit
def _row(ptr, stride, row, D: tl.constexpr, DP: tl.constexpr):
    columns = tl.arange(0, DP)
    return tl.load(ptr + row * stride + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _rows(ptr, stride, rows, valid, D: tl.constexpr, DP: tl.constexpr):
    """[len(rows), DP] in float32; zero where not valid."""
    columns = tl.arange(0, DP)
    inside = valid[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def logits_kernel(
    queries, items, index, logits, samples, query_row, item_row, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    query = _row(queries, query_row, token, D, DP)
    for first in range(0, samples, BLOCK):
        s = first + tl.arange(0, BLOCK)
        at = tl.load(index + token * samples + s, mask=s < samples, other=0)
        rows = _rows(items, item_row, at, s < samples, D, DP)
        dots = tl.sum(rows * query[None, :], 1)
        tl.store(logits + token * samples + s, dots.to(logits.dtype.element_ty), mask=s < samples)


@triton.jit
def query_gradient_kernel(
    grad, items, index, dqueries, samples, item_row, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([DP], tl.float32)
    for first in range(0, samples, BLOCK):
        s = first + tl.arange(0, BLOCK)
        at = tl.load(index + token * samples + s, mask=s < samples, other=0)
        g = tl.load(grad + token * samples + s, mask=s < samples, other=0.0).to(tl.float32)
        acc += tl.sum(_rows(items, item_row, at, s < samples, D, DP) * g[:, None], 0)
    columns = tl.arange(0, DP)
    tl.store(dqueries + token * D + columns, acc.to(dqueries.dtype.element_ty), mask=columns < D)


@triton.jit
def item_gradient_kernel(
    grad, queries, order, bounds, ditems, samples, query_row, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):
    """order: the flat positions in index, sorted by item. bounds [K + 1]: the start of each item's run in order."""
    item = tl.program_id(0).to(tl.int64)
    end = tl.load(bounds + item + 1)
    acc = tl.zeros([DP], tl.float32)
    for first in range(tl.load(bounds + item), end, BLOCK):
        valid = first + tl.arange(0, BLOCK) < end
        place = tl.load(order + first + tl.arange(0, BLOCK), mask=valid, other=0)
        g = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32)
        acc += tl.sum(_rows(queries, query_row, place // samples, valid, D, DP) * g[:, None], 0)
    columns = tl.arange(0, DP)
    tl.store(ditems + item * D + columns, acc.to(ditems.dtype.element_ty), mask=columns < D)


def shape_of(width: int) -> dict[str, int]:
    """The compile-time arguments of a launch for rows of `width` elements."""
    padded = triton.next_power_of_2(width)
    return {"D": width, "DP": padded, "BLOCK": max(4, min(64, _BLOCK_ELEMENTS // padded))}


def sampled_logits_triton(queries_TD: Tensor, items_KD: Tensor, index_TS: Tensor) -> Tensor:
    """sampled_logits_reference, accumulated in float32.

    Raises IndexError if an index lies outside of [0, K); on a GPU such an index stops the device instead.
    """
    if index_TS.numel():
        low, high = index_TS.aminmax()
        inside = (low >= 0) & (high < items_KD.shape[0])
        if index_TS.device.type != "cpu":
            torch._assert_async(inside, "index_TS must lie in [0, K), the rows of items_KD")
        elif not inside:
            raise IndexError(f"index_TS must lie in [0, {items_KD.shape[0]}); it spans [{int(low)}, {int(high)}]")
    return _Triton.apply(queries_TD, items_KD, index_TS.contiguous())


def _operand(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(queries, items, index)
        queries, items = _operand(queries), _operand(items)
        logits = queries.new_empty(index.shape)
        if logits.numel():
            with torch.cuda.device_of(queries):
                logits_kernel[(index.shape[0],)](
                    *(queries, items, index, logits, index.shape[1], queries.stride(0), items.stride(0)),
                    **shape_of(queries.shape[1]),
                    num_warps=WARPS,
                )
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, items, index = ctx.saved_tensors
        (tokens, samples), (rows, width) = index.shape, items.shape
        if not index.numel():
            return torch.zeros_like(queries), torch.zeros_like(items), None
        queries, items, grad = _operand(queries), _operand(items), grad.contiguous()
        dqueries, ditems = queries.new_empty(tokens, width), items.new_empty(rows, width)
        by_item, order = index.flatten().sort(stable=True)
        bounds = torch.searchsorted(by_item, torch.arange(rows + 1, device=index.device))
        with torch.cuda.device_of(queries):
            query_gradient_kernel[(tokens,)](
                *(grad, items, index, dqueries, samples, items.stride(0)), **shape_of(width), num_warps=WARPS
            )
            item_gradient_kernel[(rows,)](
                *(grad, queries, order, bounds, ditems, samples, queries.stride(0)), **shape_of(width), num_warps=WARPS
            )
        return dqueries, ditems, None

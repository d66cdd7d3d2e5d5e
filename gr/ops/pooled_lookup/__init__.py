"""Sums of the rows of bags over the tables of many features, with the update of the rows in backward.

F features, B bags each (the examples), T ids of all bags, E rows and D columns of a table. A feature reads one table; a
table may be read by several features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.pooled_lookup.native import pooled_lookup_native, pooled_update_native
from gr.ops.pooled_lookup.reference import pooled_lookup_reference, pooled_update_reference
from gr.ops.row_update.reference import RowRule, States

__all__ = ["BagUpdate", "pooled_lookup"]


@dataclass(frozen=True)
class BagUpdate:
    """The update of the rows of a lookup. rule: of gr.ops.row_update. states: of each table, by the rule's names.

    numbers: keyword arguments of the rule.
    """

    rule: RowRule
    states: Sequence[States]
    numbers: Mapping[str, float]


def pooled_lookup(
    weights: Sequence[Tensor], tables: Sequence[int], ids_T: Tensor, offsets: Tensor, update: BagUpdate | None = None
) -> Tensor:
    """The sum of each bag's rows, float32 (float64 of tables of it) [B, columns of all features]; of no ids, zero.

    weights: [E, D] each, on CPU, all of one dtype. tables: the table of each feature. ids_T: int64, by feature and then
    by bag. offsets: int64 [F * B + 1], where each bag begins in ids_T. update: what backward does to the rows, each
    once a call, with the sum of its gradients; None: the tables stay as they are. Nothing else has a gradient. The bits
    are the same at any number of threads. Raises IndexError for an id outside its table, ValueError for other shapes.
    """
    if update is not None and torch.is_grad_enabled():
        # Backward runs where an input asks for a gradient, and the tables cannot: they are changed in place.
        return _PooledLookup.apply(torch.empty(0, requires_grad=True), weights, tables, ids_T, offsets, update)
    return _sums(weights, tables, ids_T, offsets)


def _sums(weights: Sequence[Tensor], tables: Sequence[int], ids_T: Tensor, offsets: Tensor) -> Tensor:
    native = backend_for(weights[0].device) == "native"
    return (pooled_lookup_native if native else pooled_lookup_reference)(weights, tables, ids_T, offsets)


class _PooledLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        weights: Sequence[Tensor],
        tables: Sequence[int],
        ids_T: Tensor,
        offsets: Tensor,
        update: BagUpdate,
    ) -> Tensor:
        ctx.save_for_backward(ids_T, offsets)
        ctx.weights, ctx.tables, ctx.update = weights, tables, update
        return _sums(weights, tables, ids_T, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        update: BagUpdate = ctx.update
        change = pooled_update_native if backend_for(gradient.device) == "native" else pooled_update_reference
        ids_T, offsets = ctx.saved_tensors
        change(gradient, ctx.weights, update.states, ctx.tables, ids_T, offsets, update.rule, update.numbers)
        return (None,) * 6

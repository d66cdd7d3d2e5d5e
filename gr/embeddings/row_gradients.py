"""Gradients of dense kernels as ids and rows, so that a step costs what its batch looked up and not the whole table.

TorchRec's dense kernels, which run where fbgemm fuses no update, leave a gradient as large as the table, and forget
which rows were looked up. Both are mended here, on the kernels of a sharded model. So is a defect of fbgemm-gpu-cpu
1.8.0, whose dense kernel pools sequence lookups on CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen
from torch import Tensor

# (ids [T], gradients [T, D]) of one shard, ids by the shard's own rows.
RowGradient = tuple[Tensor, Tensor]


class LocalRows:
    """The lookup and the gradients of a dense kernel whose shards this rank alone has."""

    def __init__(self, tables: DenseTableBatchedEmbeddingBagsCodegen) -> None:
        self._tables = tables
        self._pending: dict[int, list[RowGradient]] = {}
        tables.forward = partial(_lookup, tables, self._rows)

    def take(self, index: int) -> RowGradient | None:
        """The gradients of one shard since the last call; None where backward has left none."""
        pending = self._pending.pop(index, None)
        if pending is None:
            return None
        ids, gradients = zip(*pending, strict=True)
        return torch.cat(ids), torch.cat(gradients)

    def agree(self) -> None:
        """Nothing: other ranks look up no rows of these shards."""

    def clear(self) -> None:
        self._pending.clear()

    def _rows(self, index: int, ids_T: Tensor) -> Tensor:
        return rows_of(_weight(self._tables, index), ids_T, partial(self._record, index, ids_T))

    def _record(self, index: int, ids_T: Tensor, gradient_TD: Tensor) -> None:
        self._pending.setdefault(index, []).append((ids_T, gradient_TD))


class ReplicatedRows:
    """The gradients of a data-parallel kernel: dense, averaged over the ranks, of the rows that any rank looked up."""

    def __init__(self, tables: DenseTableBatchedEmbeddingBagsCodegen) -> None:
        self._tables = tables
        self._starts = torch.tensor([0, *(rows for rows, _ in tables.embedding_specs)]).cumsum(0).tolist()
        self._looked_up = torch.zeros(self._starts[-1], dtype=torch.uint8, device=tables.weights.device)
        if tables.use_cpu:
            tables.forward = partial(_lookup, tables, lambda index, ids: F.embedding(ids, _weight(tables, index)))
        tables.register_forward_hook(self._watch, with_kwargs=True)

    def agree(self) -> None:
        """Unites the rows that the ranks looked up. Every rank must call it."""
        dist.all_reduce(self._looked_up, op=dist.ReduceOp.MAX)

    def take(self, index: int) -> RowGradient | None:
        """The gradients of one shard; None where backward has left none."""
        if self._tables.weights.grad is None:
            return None
        ids = self._looked_up[self._starts[index] : self._starts[index + 1]].nonzero().squeeze(1)
        return ids, _part(self._tables, self._tables.weights.grad, index)[ids].float()

    def clear(self) -> None:
        self._tables.weights.grad = None
        self._looked_up.zero_()

    def _watch(self, _: Any, arguments: tuple, named: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            inputs = dict(zip(("indices", "offsets"), arguments, strict=False)) | named
            output.register_hook(lambda _: self._mark(inputs["indices"], inputs["offsets"]))

    def _mark(self, indices: Tensor, offsets: Tensor) -> None:
        first_F = self._tables.hash_size_cumsum[:-1]
        bounds = offsets[:: (len(offsets) - 1) // len(first_F)]
        first_T = torch.repeat_interleave(first_F, bounds.diff(), output_size=len(indices))
        self._looked_up[first_T + indices] = 1


def rows_of(weight_ED: Tensor, ids_T: Tensor, take: Callable[[Tensor], None]) -> Tensor:
    """float32 [T, D]: rows of a table, whose gradients `take` gets in the backward pass, and not the table."""
    rows_TD = weight_ED.detach().index_select(0, ids_T).float()
    if torch.is_grad_enabled():
        rows_TD.requires_grad_()
        rows_TD.register_hook(take)
    return rows_TD


def runs_of(table_F: Sequence[int], offsets: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(table, features, offsets of their bags) of each run of features that share a table: it has one gradient."""
    batch_size, feature = (len(offsets) - 1) // len(table_F), 0
    for table, same in groupby(table_F):
        first, feature = feature, feature + len(list(same))
        yield table, feature - first, offsets[first * batch_size : feature * batch_size + 1]


def _lookup(
    tables: DenseTableBatchedEmbeddingBagsCodegen,
    look_up: Callable[[int, Tensor], Tensor],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    feature_requires_grad: Tensor | None = None,
    batch_size_per_feature_per_rank: list[list[int]] | None = None,
) -> Tensor:
    """fbgemm's forward, from look_up(table, ids): float32 [T, D], or [B, features x D] of pooled tables."""
    if per_sample_weights is not None or batch_size_per_feature_per_rank is not None:
        raise ValueError("dense kernels take no weights of ids, and batches of one size for all features")
    pooled = tables.pooling_mode != PoolingMode.NONE
    outputs: list[Tensor] = []
    index_of = {start: index for index, start in enumerate(tables.weights_physical_offsets[:-1])}
    table_F = [index_of[start] for start in tables.weights_offsets.tolist()]
    for index, features, bounds in runs_of(table_F, offsets):
        ids = indices[int(bounds[0]) : int(bounds[-1])].long()
        rows_TD = look_up(index, ids).float()
        if pooled:
            outputs.extend(_pooled(rows_TD, bounds - bounds[0], tables.pooling_mode).chunk(features))
        else:
            outputs.append(rows_TD)
    return torch.cat(outputs, 1 if pooled else 0)


def _pooled(rows_TD: Tensor, offsets: Tensor, mode: PoolingMode) -> Tensor:
    if not len(rows_TD):
        return rows_TD.sum() + rows_TD.new_zeros(len(offsets) - 1, rows_TD.shape[1])
    places = torch.arange(len(rows_TD), device=rows_TD.device)
    kind = "mean" if mode == PoolingMode.MEAN else "sum"
    return F.embedding_bag(places, rows_TD, offsets.long(), mode=kind, include_last_offset=True)


def _weight(tables: DenseTableBatchedEmbeddingBagsCodegen, index: int) -> Tensor:
    return _part(tables, tables.weights, index)


def _part(tables: DenseTableBatchedEmbeddingBagsCodegen, flat: Tensor, index: int) -> Tensor:
    """[rows, D] of one table in the storage of all."""
    rows, dim = tables.embedding_specs[index]
    start = tables.weights_physical_offsets[index]
    return flat[start : start + rows * dim].view(rows, dim)

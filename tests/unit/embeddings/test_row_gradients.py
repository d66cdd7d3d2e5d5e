"""The lookups and gradients of dense kernels on CPU, beside those of ordinary tensors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen as Tables
from torch import Tensor

from gr.embeddings.row_gradients import LocalRows, ReplicatedRows
from gr.embeddings.row_gradients import _lookup as lookup

# 3 features of 2 bags each; the first two read one table.
IDS = [[4, 0], [], [], [0, 0, 2], [], [1]]
FEATURE_TABLES = [0, 0, 1]
SHAPES = [(5, 4), (3, 4)]


def tables(pooling: PoolingMode) -> Tables:
    made = Tables(SHAPES, feature_table_map=FEATURE_TABLES, pooling_mode=pooling, use_cpu=True)
    with torch.no_grad():
        made.weights.copy_(torch.randn(made.weights.shape, generator=torch.Generator().manual_seed(0)))
    return made


def inputs(bags: list[list[int]]) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *itertools.accumulate(map(len, bags))])
    return torch.tensor(list(itertools.chain(*bags)), dtype=torch.int64), offsets


def expected(made: Tables, bags: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the dense gradient of each table for a gradient of 1, 2, 3, ... of the output's elements."""
    plain = [made.weights[:20].view(5, 4), made.weights[20:].view(3, 4)]
    plain = [weight.detach().clone().requires_grad_() for weight in plain]
    parts = []
    for feature, table in enumerate(FEATURE_TABLES):
        own = bags[2 * feature : 2 * feature + 2]
        ids, offsets = inputs(own)
        if made.pooling_mode == PoolingMode.NONE:
            parts.append(plain[table][ids])
        else:
            mode = "mean" if made.pooling_mode == PoolingMode.MEAN else "sum"
            parts.append(F.embedding_bag(ids, plain[table], offsets, mode=mode, include_last_offset=True))
    out = torch.cat(parts, 0 if made.pooling_mode == PoolingMode.NONE else 1)
    (out * torch.arange(1, 1 + out.numel()).view_as(out)).sum().backward()
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in plain]
    return out.detach(), gradients


def test_the_installed_release_pools_sequence_lookups() -> None:
    """When this fails, fbgemm has mended it: replicated kernels need no lookup of our own."""
    rows = Tables([(3, 4)], pooling_mode=PoolingMode.NONE, use_cpu=True)(
        torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3])
    )
    assert rows.shape[0] == 2


@pytest.mark.parametrize("rows", [LocalRows, ReplicatedRows])
@pytest.mark.parametrize("pooling", [PoolingMode.NONE, PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("bags", [IDS, [[]] * 6, [[], [], [], [], [2, 2], []]], ids=["ids", "none", "one table"])
def test_lookups_and_gradients(
    rows: type[LocalRows | ReplicatedRows], pooling: PoolingMode, bags: list[list[int]]
) -> None:
    made = tables(pooling)
    gradients, (ids, offsets) = rows(made), inputs(bags)
    out = made(indices=ids, offsets=offsets)
    want, dense = expected(made, bags)
    assert torch.allclose(out, want, atol=1e-6)
    (out * torch.arange(1, 1 + out.numel()).view_as(out)).sum().backward()
    looked_up = [sorted({*bags[0], *bags[1], *bags[2], *bags[3]}), sorted({*bags[4], *bags[5]})]
    for index, (whole, own) in enumerate(zip(dense, looked_up, strict=True)):
        taken = gradients.take(index)
        assert taken is not None
        summed = torch.zeros_like(whole).index_add_(0, *taken)
        assert torch.allclose(summed, whole, atol=1e-6)
        assert taken[0].unique().tolist() == own
    gradients.clear()
    assert gradients.take(0) is None


def test_one_bag_a_feature() -> None:
    made = tables(PoolingMode.SUM)
    LocalRows(made)
    ids, offsets = inputs([[1], [0, 2], [2]])
    plain = [made.weights[:20].view(5, 4), made.weights[20:].view(3, 4)]
    assert torch.allclose(made(ids, offsets), torch.cat([plain[0][1], plain[0][0] + plain[0][2], plain[1][2]])[None])


def test_what_has_no_lookup_is_refused() -> None:
    made = tables(PoolingMode.SUM)
    ids, offsets = inputs(IDS)
    with pytest.raises(ValueError, match="no weights of ids"):
        lookup(made, lambda index, ids: ids, ids, offsets, per_sample_weights=torch.ones(len(ids)))

"""The defect of fbgemm's dense kernel on CPU is still there, and the repair is right."""

import itertools

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen as Tables
from torch import Tensor

from gr import compat
from gr.compat import fbgemm_cpu

# 3 features of 2 bags each; the first two read one table.
IDS = [[4, 0], [], [], [0, 0, 2], [], [1]]
FEATURE_TABLES = [0, 0, 1]
SHAPES = [(5, 4), (3, 4)]


@pytest.fixture(autouse=True)
def _as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was repaired before in this process, and after."""
    monkeypatch.setattr(Tables, "forward", fbgemm_cpu._original_forward)


def test_the_installed_release_has_the_defect() -> None:
    assert compat.dense_sequence_lookup_is_broken(), "upstream has fixed it, remove the repair"


def test_apply_repairs_it_and_can_be_called_again() -> None:
    for _ in range(2):
        compat.apply()
        assert not compat.dense_sequence_lookup_is_broken()
        assert Tables.forward is fbgemm_cpu._sequence_lookup


def test_what_is_not_broken_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "dense_sequence_lookup_is_broken", lambda: False)
    compat.apply()
    assert Tables.forward is fbgemm_cpu._original_forward


def tables(pooling: PoolingMode = PoolingMode.NONE) -> Tables:
    made = Tables(SHAPES, feature_table_map=FEATURE_TABLES, pooling_mode=pooling, use_cpu=True)
    with torch.no_grad():
        made.weights.copy_(torch.randn(made.weights.shape, generator=torch.Generator().manual_seed(0)))
    return made


def plain(made: Tables) -> list[Tensor]:
    """Each table as an ordinary tensor."""
    return [made.weights[:20].view(5, 4), made.weights[20:].view(3, 4)]


def inputs(bags: list[list[int]]) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *itertools.accumulate(map(len, bags))])
    return torch.tensor(list(itertools.chain(*bags)), dtype=torch.int64), offsets


@pytest.mark.parametrize(
    "bags", [IDS, [[], [], [], [], [], []], [[1], [], [], [], [], []], [[], [], [], [], [0], [2, 2]]], ids=str
)
def test_a_repaired_lookup(bags: list[list[int]]) -> None:
    """One row an id, in the order of the ids; every id adds its gradient to its row."""
    compat.apply()
    made = tables()
    rows = made(*inputs(bags))
    which = [(FEATURE_TABLES[bag // 2], row) for bag, ids in enumerate(bags) for row in ids]
    expected = [plain(made)[table][row] for table, row in which]
    assert rows.shape == (len(which), 4) and rows.dtype == torch.float32
    assert all(torch.equal(row, other) for row, other in zip(rows, expected, strict=True))
    upstream = torch.randn(rows.shape)
    (gradient,) = torch.autograd.grad(rows, made.weights, upstream)
    summed = [torch.zeros(shape) for shape in SHAPES]
    for (table, row), each in zip(which, upstream, strict=True):
        summed[table][row] += each
    assert torch.allclose(gradient, torch.cat([x.flatten() for x in summed]), atol=1e-6)


def test_pooled_lookups_stay_as_they_were() -> None:
    made = tables(PoolingMode.SUM)
    before = made(*inputs(IDS))
    compat.apply()
    assert torch.equal(made(*inputs(IDS)), before) and before.shape == (2, 12)


def test_variable_batch_sizes_are_refused() -> None:
    compat.apply()
    with pytest.raises(ValueError, match="variable batch sizes have no CPU sequence lookup"):
        tables()(*inputs(IDS), batch_size_per_feature_per_rank=[[2], [2], [2]])

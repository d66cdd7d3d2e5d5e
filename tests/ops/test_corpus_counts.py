"""corpus_counts against its reference: sizes that fill no block, seen items, ties, NaN, threads, parts of a corpus."""

import pytest
import torch
from torch import Tensor

from gr.ops.backend import force_backend
from gr.ops.corpus_counts import corpus_counts, target_scores

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make(Q: int, C: int, D: int, seed: int = 0) -> Case:
    """Queries, items of small integers (so that scores are exact and tie), target columns, seen pairs."""
    draw = torch.Generator().manual_seed(seed)
    queries_QD = torch.randint(-2, 3, (Q, D), generator=draw).float()
    items_CD = torch.randint(-1, 2, (C, D), generator=draw).float()
    column_Q = torch.randint(0, C, (Q,), generator=draw)
    query_S = torch.arange(Q).repeat_interleave(min(C, 9))
    column_S = torch.cat([torch.randperm(C, generator=draw)[:9] for _ in range(Q)])
    others = column_S != column_Q[query_S]
    return queries_QD, items_CD, column_Q, query_S[others], column_S[others]


def counted(queries_QD: Tensor, items_CD: Tensor, column_Q: Tensor, *seen: Tensor) -> Tensor:
    return corpus_counts(queries_QD, items_CD, target_scores(queries_QD, items_CD, column_Q), *seen)


@pytest.mark.parametrize(("Q", "C", "D"), [(1, 1, 1), (3, 5, 7), (65, 241, 50), (130, 719, 33), (64, 480, 16)])
def test_against_the_reference(Q: int, C: int, D: int) -> None:
    case = make(Q, C, D)
    with force_backend("torch"):
        expected, target_Q = counted(*case), target_scores(*case[:3])
    with force_backend("native"):
        assert torch.equal(counted(*case), expected) and torch.equal(target_scores(*case[:3]), target_Q)
    assert (expected[:, 1] >= 1).all() and (C < 100 or (expected[:, 1] > 1).any())


def test_equal_items_tie_wherever_they_stand() -> None:
    """And the parts of a corpus add up to the whole: neither place nor part changes a bit of a score."""
    draw = torch.Generator().manual_seed(1)
    queries_QD, item_D = torch.randn(70, 50, generator=draw), torch.randn(50, generator=draw)
    items_CD = torch.randn(700, 50, generator=draw)
    items_CD[::7] = item_D
    nothing = torch.empty(0, dtype=torch.int64)
    target_Q = target_scores(queries_QD, items_CD, torch.zeros(70, dtype=torch.int64))
    whole = corpus_counts(queries_QD, items_CD, target_Q, nothing, nothing)
    assert (whole[:, 1] == 100).all()
    parts = [
        corpus_counts(queries_QD, part, target_Q, nothing, nothing) for part in items_CD.tensor_split([1, 250, 251])
    ]
    assert torch.equal(sum(parts), whole)
    part = target_scores(queries_QD[5:6], items_CD[7:8], torch.zeros(1, dtype=torch.int64))
    assert torch.equal(part, target_Q[5:6])


def test_a_nan_is_counted_unless_it_is_seen() -> None:
    queries_QD, items_CD, column_Q, *_ = make(3, 300, 8)
    items_CD[250] = torch.nan
    column_Q = column_Q % 250
    seen = torch.tensor([1]), torch.tensor([250])
    for name in ("native", "torch"):
        with force_backend(name):
            assert counted(queries_QD, items_CD, column_Q, *seen)[:, 2].tolist() == [1, 0, 1]


def test_no_items_and_no_target_here() -> None:
    """A rank of a sharded evaluation may hold no item, or not the target's."""
    queries_QD, items_CD, *_ = make(3, 20, 8)
    nowhere = torch.full((3,), -1)
    nothing = torch.empty(0, dtype=torch.int64)
    for items in (items_CD, items_CD[:0]):
        assert target_scores(queries_QD, items, nowhere).tolist() == [0, 0, 0]
    assert corpus_counts(queries_QD, items_CD[:0], torch.zeros(3), nothing, nothing).sum() == 0


def test_any_number_of_threads() -> None:
    case = make(65, 2000, 20)
    expected, threads = counted(*case), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(counted(*case), expected)
    finally:
        torch.set_num_threads(threads)

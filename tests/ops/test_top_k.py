"""The k best: against a sort, with ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gr.ops.top_k import best

SCORES = st.sampled_from([-torch.inf, 0.0, 0.5, 1.0, 2.0])


@given(
    st.lists(st.lists(SCORES, min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(1, 6),
    st.permutations(range(10, 16)),
)
def test_best_first_and_of_equal_scores_the_smaller_id(rows: list[list[float]], k: int, ids: list[int]) -> None:
    scores_QC = torch.tensor(rows)
    scores_QK, ids_QK = best(scores_QC, torch.tensor(ids).expand(len(rows), -1), k)
    for row, got_scores, got_ids in zip(rows, scores_QK.tolist(), ids_QK.tolist(), strict=True):
        expected = sorted(zip(row, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
        assert list(zip(got_scores, got_ids, strict=True)) == expected


@pytest.mark.parametrize("k", [1, 3])
def test_an_empty_batch(k: int) -> None:
    scores_QK, ids_QK = best(torch.empty(0, 5), torch.empty(0, 5, dtype=torch.int64), k)
    assert scores_QK.shape == ids_QK.shape == (0, k)


def test_a_nan_is_the_best_also_beside_ties() -> None:
    scores_QK, ids_QK = best(
        torch.tensor([[1.0, torch.nan, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0]]), torch.arange(8).view(2, 4), 2
    )
    assert scores_QK.isnan().tolist() == [[True, False], [False, False]]
    assert ids_QK.tolist() == [[1, 0], [5, 6]]


def test_many_columns_are_searched_in_groups() -> None:
    """Whole and part groups, scores that all differ, ties, NaN and minus infinity: as a sort finds them."""
    random = torch.Generator().manual_seed(0)
    for columns in (640, 647):
        scores_QC = torch.randn(6, columns, generator=random)
        scores_QC[1].mul_(3).round_()
        scores_QC[2, 5:] = -torch.inf
        scores_QC[3, 3::90] = torch.nan
        scores_QC[4] = 0.0
        scores_QC[5, -3:] = 9.0
        ids_QC = torch.randperm(columns, generator=random).expand(6, -1)
        expected = sorted_by_score_and_id(scores_QC, ids_QC, 9)
        scores_QK, ids_QK = best(scores_QC, ids_QC, 9)
        assert torch.equal(scores_QK.nan_to_num(10.0), expected[0].nan_to_num(10.0))
        known_QK = ~scores_QK.isnan()
        assert torch.equal(ids_QK[known_QK], expected[1][known_QK])


def sorted_by_score_and_id(scores_QC: torch.Tensor, ids_QC: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    by_id = ids_QC.argsort(dim=1)
    scores_QC, ids_QC = scores_QC.gather(1, by_id), ids_QC.gather(1, by_id)
    by_score = scores_QC.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores_QC.gather(1, by_score), ids_QC.gather(1, by_score)

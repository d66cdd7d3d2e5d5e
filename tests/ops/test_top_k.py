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

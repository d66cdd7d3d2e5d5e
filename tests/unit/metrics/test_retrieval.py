"""Retrieval metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from gr.metrics.retrieval import mean_difference, paired_difference, retrieval_metrics, user_metrics


def test_hand_values() -> None:
    values = retrieval_metrics(np.array([1.0, 3.0, 10.5, 300.0]))
    assert list(values) == ["hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr"]
    assert (values["hr@1"], values["hr@10"], values["hr@50"], values["hr@200"]) == (0.25, 0.5, 0.75, 0.75)
    assert values["ndcg@10"] == pytest.approx((1 + 1 / 2) / 4)
    assert values["ndcg@50"] == values["ndcg@200"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(11.5)) / 4)
    assert values["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 10.5 + 1 / 300) / 4)


def test_a_rank_counts_at_k() -> None:
    assert user_metrics(np.array([10, 11]))["hr@10"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("ranks", [[], [0.5], [np.nan], [np.inf], [[1.0]]])
def test_ranks_that_are_none(ranks: list) -> None:
    with pytest.raises(ValueError, match="rank"):
        retrieval_metrics(np.array(ranks))


def test_paired_difference() -> None:
    mean, error = paired_difference(np.array([1, 1, 0, 1]), np.array([0, 1, 0, 0]))
    assert mean == 0.5 and error == pytest.approx(math.sqrt(1 / 3) / 2)
    with pytest.raises(ValueError, match="same users"):
        paired_difference(np.array([1.0]), np.array([1.0]))


def test_a_difference_of_means_has_its_error_over_users():
    random = np.random.default_rng(0)
    values = random.integers(1, 6, (40, 3)).astype(float) + random.random((40, 1))
    a, b = random.random((2, 40, 3)) < 0.6
    difference, error = mean_difference(values, a, b)
    assert difference == pytest.approx(values[a].mean() - values[b].mean())
    drawn = random.integers(0, 40, (4000, 40))
    resampled = [values[users][a[users]].mean() - values[users][b[users]].mean() for users in drawn]
    assert error == pytest.approx(np.std(resampled), rel=0.1)
    assert mean_difference(values, a, a) == (0.0, 0.0)
    assert mean_difference(values, a, np.zeros_like(a)) is None

"""Retrieval metrics from the rank of each user's held-out item among all candidates.

A user has one relevant item, so HR@K is recall and the ideal DCG is 1 (Krichene and Rendle, KDD 2020, section 2).
"""

import numpy as np

HIT_RATE_AT = (1, 10, 50, 200)
NDCG_AT = (10, 50, 200)


def retrieval_metrics(ranks: np.ndarray) -> dict[str, float]:
    """hr@{1,10,50,200}, ndcg@{10,50,200} and mrr, means over users.

    ranks: [users], 1 is best; ties may have their mean rank. A rank <= K is a hit at K, with the gain
    1 / log2(1 + rank). Raises ValueError on no ranks, or a rank below 1 or not finite.
    """
    return {name: float(values.mean()) for name, values in user_metrics(ranks).items()}


def user_metrics(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of retrieval_metrics for each user, [users]: the input of paired_difference."""
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or len(ranks) == 0:
        raise ValueError(f"ranks must be a vector of at least one rank, has shape {ranks.shape}")
    if not (np.isfinite(ranks) & (ranks >= 1)).all():
        raise ValueError(f"ranks must be finite and at least 1, found {ranks[~(ranks >= 1) | ~np.isfinite(ranks)][0]}")
    gain = 1.0 / np.log2(1.0 + ranks)
    metrics = {f"hr@{k}": (ranks <= k).astype(np.float64) for k in HIT_RATE_AT}
    metrics |= {f"ndcg@{k}": np.where(ranks <= k, gain, 0.0) for k in NDCG_AT}
    return metrics | {"mrr": 1.0 / ranks}


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over the same users, and its standard error (sample deviation / sqrt(users)).

    a, b: a metric of each user, [users], in one order. Raises ValueError on different shapes or fewer than 2 users.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"a and b must be vectors over the same users, at least 2, not {a.shape} and {b.shape}")
    difference = a - b
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def mean_difference(values_UW: np.ndarray, of_a_UW: np.ndarray, of_b_UW: np.ndarray) -> tuple[float, float] | None:
    """The mean of the values that are a's minus the mean of those that are b's, and its standard error over users.

    values_UW: W values of each user. of_a_UW, of_b_UW: bool. The error is that of the means linearised (delta method),
    paired by user. None where a or b has no value, or there are fewer than 2 users.
    """
    if len(values_UW) < 2 or not of_a_UW.any() or not of_b_UW.any():
        return None
    means = [float(values_UW[of_UW].mean()) for of_UW in (of_a_UW, of_b_UW)]
    shares_U = [
        ((values_UW - mean) * of_UW).sum(1) / (of_UW.sum() / len(of_UW))
        for mean, of_UW in zip(means, (of_a_UW, of_b_UW), strict=True)
    ]
    return means[0] - means[1], paired_difference(*shares_U)[1]

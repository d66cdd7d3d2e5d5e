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

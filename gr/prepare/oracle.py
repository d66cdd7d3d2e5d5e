"""Expected metrics of a scorer that gives whole groups of items one score, as the oracles of synthetic data do.

Evaluation that filters seen items keeps the target as a candidate even if the user has seen it. A scorer that puts seen
items first then ranks every repeated target first and loses nothing elsewhere, so where targets repeat the bound
under filtering is much higher than what the generator's structure explains. Hence three numbers (`by_protocol`).

B records, N events of history, G groups (categories, clusters): every candidate of a group has the group's score.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

HIT_RATE_AT = (1, 10, 50)
NDCG_AT = (10, 50)
_SAME = 1e-9  # relative difference below which two scores are a tie, against rounding


def group_ranks(score_BG: np.ndarray, size_BG: np.ndarray, target_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(better, tied), int64 [B]: candidates scored above the target, and with its score, the target among them.

    score_BG: score of each candidate of a group. size_BG: candidates of the group. target_B: group of the target.
    """
    mine_B1 = np.take_along_axis(score_BG, target_B[:, None], axis=1)
    tied_BG = np.abs(score_BG - mine_B1) <= _SAME * np.abs(mine_B1)
    better_BG = (score_BG > mine_B1) & ~tied_BG
    return (size_BG * better_BG).sum(axis=1), (size_BG * tied_BG).sum(axis=1)


def expected_metrics(better_B: np.ndarray, tied_B: np.ndarray) -> dict[str, float]:
    """hr@{1,10,50}, ndcg@{10,50} and mrr when ties are broken at random, means over records.

    The rank is uniform over better + 1 .. better + tied, and each metric is its expected value over these ranks.
    """
    last_B = better_B + tied_B
    ranks = np.arange(1, int(last_B.max()) + 1)
    gain_to = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(1.0 + ranks))])
    reciprocal_to = np.concatenate([[0.0], np.cumsum(1.0 / ranks)])
    metrics = {f"hr@{k}": np.clip(k - better_B, 0, tied_B) / tied_B for k in HIT_RATE_AT}
    for k in NDCG_AT:
        metrics[f"ndcg@{k}"] = (gain_to[np.minimum(last_B, k)] - gain_to[np.minimum(better_B, k)]) / tied_B
    metrics["mrr"] = (reciprocal_to[last_B] - reciprocal_to[better_B]) / tied_B
    return {name: float(values.mean()) for name, values in metrics.items()}


def by_protocol(
    score_BG: np.ndarray, size_BG: np.ndarray, seen_BG: np.ndarray, target_B: np.ndarray, repeated_B: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(better, tied) under each way to treat seen items.

    filter_seen=none: all items are candidates; the upper bound, and the comparison to prefer. filter_seen=all: seen
    items but the target are not; the upper bound, seen items scored first. filter_seen=all, repeats not exploited: the
    same candidates with the scores of filter_seen=none; not a bound.
    seen_BG: distinct seen items of each group, target not counted. repeated_B: whether the target was seen.
    """
    better_B, tied_B = group_ranks(score_BG, size_BG - seen_BG, target_B)
    return {
        "filter_seen=none": group_ranks(score_BG, size_BG, target_B),
        "filter_seen=all": (np.where(repeated_B, 0, better_B), np.where(repeated_B, 1, tied_B)),
        "filter_seen=all, repeats not exploited": (better_B, tied_B),
    }


def stream_oracle(
    options: Any,
    knows: str,
    group_of_item: np.ndarray,
    chunks: Iterable[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]],
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, float]]]]:
    """(header of oracle.json, expected metrics by scorer and protocol), for the newest event of the test records.

    options: a StreamOptions. group_of_item: [E], group of each item id, or -1. chunks: (items_BN, size_BG, score_BG by
    scorer) of all test records, as in `group_ranks`.
    """
    ranks: dict[str, list[dict[str, tuple[np.ndarray, np.ndarray]]]] = {}
    repeats = []
    for items_BN, size_BG, scores in chunks:
        history_BN, target_B = items_BN[:, :-1], items_BN[:, -1]
        seen_BG = seen_in_groups(history_BN, target_B, group_of_item, size_BG.shape[1])
        repeats.append((history_BN == target_B[:, None]).any(axis=1))
        for name, score_BG in scores.items():
            ranks.setdefault(name, []).append(
                by_protocol(score_BG, size_BG, seen_BG, group_of_item[target_B], repeats[-1])
            )
    about = {
        "options": asdict(options),
        "target": "newest event of each record of test/",
        "records": options.records - options.train_records,
        "repeated_targets": float(np.concatenate(repeats).mean()),
        "knows": knows,
    }
    return about, {name: _averaged(chunks) for name, chunks in ranks.items()}


def _averaged(chunks: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> dict[str, dict[str, float]]:
    """expected_metrics of each protocol over all chunks."""
    return {
        name: expected_metrics(*(np.concatenate([chunk[name][i] for chunk in chunks]) for i in (0, 1)))
        for name in chunks[0]
    }


def seen_in_groups(items_BN: np.ndarray, target_B: np.ndarray, group_of_item: np.ndarray, groups: int) -> np.ndarray:
    """Distinct items of each group in a record's history, its target not counted, int64 [B, groups].

    group_of_item: [E], group of each item id, or -1.
    """
    records = len(items_BN)
    ordered = np.sort(items_BN, axis=1)
    first = np.ones_like(ordered, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first &= ordered != target_B[:, None]
    row, column = np.nonzero(first)
    group = group_of_item[ordered[row, column]]
    return np.bincount(row * groups + group, minlength=records * groups).reshape(records, groups)

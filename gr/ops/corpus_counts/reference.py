"""How many items of a corpus beat a query's target, in plain PyTorch: the definition. Q queries, C items, D width."""

from collections.abc import Iterator

import torch
from torch import Tensor

SCORE_BLOCK = 1 << 15  # items whose scores exist at once


def target_scores_reference(queries_QD: Tensor, items_CD: Tensor, column_Q: Tensor) -> Tensor:
    """The score of each query with item column_Q, float32 [Q]; 0 where column_Q is -1.

    They come from the products of corpus_counts: a product of another shape may round a score to other bits.
    """
    target_Q = queries_QD.new_zeros(len(queries_QD))
    for first, score in _score_blocks(queries_QD, items_CD):
        inside = (column_Q >= first) & (column_Q < first + score.shape[1])
        target_Q[inside] = score[inside, column_Q[inside] - first]
    return target_Q


def corpus_counts_reference(
    queries_QD: Tensor, items_CD: Tensor, target_Q: Tensor, seen_query_S: Tensor, seen_column_S: Tensor
) -> Tensor:
    counts_Q3 = torch.zeros(len(queries_QD), 3, dtype=torch.int64, device=queries_QD.device)
    target_Q1 = target_Q[:, None]
    for first, score in _score_blocks(queries_QD, items_CD):
        inside = (seen_column_S >= first) & (seen_column_S < first + score.shape[1])
        score[seen_query_S[inside], seen_column_S[inside] - first] = -torch.inf
        counts_Q3 += torch.stack([(score > target_Q1).sum(1), (score == target_Q1).sum(1), score.isnan().sum(1)], 1)
    return counts_Q3


def _score_blocks(queries_QD: Tensor, items_CD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first item, scores [Q, at most SCORE_BLOCK])."""
    for first in range(0, len(items_CD), SCORE_BLOCK):
        yield first, queries_QD @ items_CD[first : first + SCORE_BLOCK].T

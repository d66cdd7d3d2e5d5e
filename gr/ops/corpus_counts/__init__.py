"""How many items of a corpus beat a query's target, without the matrix of all scores. Q queries, C items, D width."""

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.corpus_counts.reference import corpus_counts_reference, target_scores_reference

__all__ = ["corpus_counts", "target_scores"]


@torch.no_grad()
def target_scores(queries_QD: Tensor, items_CD: Tensor, column_Q: Tensor) -> Tensor:
    """The score of each query with item column_Q, float32 [Q]; 0 where column_Q is -1. The score is the dot product, to
    the bit the one that corpus_counts compares. queries_QD, items_CD: float32. column_Q: int64.
    """
    if backend_for(queries_QD.device) != "native":
        return target_scores_reference(queries_QD, items_CD, column_Q)
    score_Q = queries_QD.new_zeros(len(queries_QD))
    inside = column_Q >= 0
    score_Q[inside] = torch.ops.gr.paired_scores(queries_QD[inside].contiguous(), items_CD[column_Q[inside]])
    return score_Q


@torch.no_grad()
def corpus_counts(
    queries_QD: Tensor, items_CD: Tensor, target_Q: Tensor, seen_query_S: Tensor, seen_column_S: Tensor
) -> Tensor:
    """Counts the items whose scores are above target_Q, equal to it, and not a number, by query; int64 [Q, 3].

    queries_QD, items_CD, target_Q: float32. seen_query_S, seen_column_S: int64, pairs of a query and an item, whose
    score is taken for minus infinity. On CPU equal items have equal bits, at any number of threads and whatever part of
    a corpus items_CD is.
    """
    if backend_for(queries_QD.device) != "native":
        return corpus_counts_reference(queries_QD, items_CD, target_Q, seen_query_S, seen_column_S)
    seen = seen_query_S.contiguous(), seen_column_S.contiguous()
    return torch.ops.gr.corpus_counts(queries_QD.contiguous(), items_CD.contiguous(), target_Q.contiguous(), *seen)

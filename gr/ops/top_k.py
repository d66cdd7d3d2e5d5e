"""The k best of rows of scores, with ties in the order of ids. Q queries, C candidates, K results."""

from torch import Tensor


def best(scores_QC: Tensor, ids_QC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, best first; of equal scores the smaller ids, wherever they stand."""
    values, place = scores_QC.topk(min(k + 1, scores_QC.shape[1]), dim=1)
    scores_QK, ids_QK = values[:, :k], ids_QC.gather(1, place[:, :k])
    tied_Q = (values[:, 1:] == values[:, :-1]).any(1)
    if bool(tied_Q.any()):
        # Ties are of few rows, and only these are ordered again.
        scores_QK = scores_QK.clone()
        if values.shape[1] > k:
            # Only where the next one is as good does an id decide who is in.
            open_Q = values[:, k - 1] == values[:, k]
            if bool(open_Q.any()):
                scores_QK[open_Q], ids_QK[open_Q] = _best_of_ties(scores_QC[open_Q], ids_QC[open_Q], k)
        scores_QK[tied_Q], ids_QK[tied_Q] = _ordered(scores_QK[tied_Q], ids_QK[tied_Q])
    return scores_QK, ids_QK


def _ordered(scores_QK: Tensor, ids_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Best first; of equal scores the smaller id."""
    by_id = ids_QK.argsort(dim=1, stable=True)
    ids_QK, scores_QK = ids_QK.gather(1, by_id), scores_QK.gather(1, by_id)
    by_score = scores_QK.argsort(dim=1, descending=True, stable=True)
    return scores_QK.gather(1, by_score), ids_QK.gather(1, by_score)


def _best_of_ties(scores_QC: Tensor, ids_QC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row in the order of ids; of those equal to the last of them the smaller ids. NaN is best."""
    by_id = ids_QC.argsort(dim=1, stable=True)
    scores_QC, ids_QC = scores_QC.gather(1, by_id), ids_QC.gather(1, by_id)
    threshold_Q1 = scores_QC.topk(k, dim=1).values[:, -1:]
    better_QC, equal_QC = ~(scores_QC <= threshold_Q1), scores_QC == threshold_Q1  # NaN is better
    room_Q1 = k - better_QC.sum(1, keepdim=True)
    chosen = (better_QC | (equal_QC & (equal_QC.cumsum(1) <= room_Q1))).nonzero()[:, 1].view(len(scores_QC), k)
    return scores_QC.gather(1, chosen), ids_QC.gather(1, chosen)

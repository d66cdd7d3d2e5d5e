"""The k best of rows of scores, with ties in the order of ids. Q queries, C candidates, K results."""

import torch
from torch import Tensor

_GROUP = 16  # scores of a group
_FEW = 4  # groups a result, from which on groups are looked at first


def best(scores_QC: Tensor, ids_QC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, best first; of equal scores the smaller ids, wherever they stand."""
    values, place = _greatest(scores_QC, min(k + 1, scores_QC.shape[1]))
    scores_QK, ids_QK = values[:, :k], ids_QC.gather(1, place[:, :k])
    tied_Q = (values[:, 1:] == values[:, :-1]).any(1)
    if bool(tied_Q.any()):
        # Ties are of few rows, and only these are ordered again.
        scores_QK = scores_QK.clone()
        if values.shape[1] > k:
            # Only where the next one is as good does an id decide who is in.
            open_Q = values[:, k - 1] == values[:, k]
            if bool(open_Q.any()):
                ids_QK[open_Q] = _smallest_of_last(scores_QC[open_Q], ids_QC[open_Q], scores_QK[open_Q], ids_QK[open_Q])
        scores_QK[tied_Q], ids_QK[tied_Q] = _ordered(scores_QK[tied_Q], ids_QK[tied_Q])
    return scores_QK, ids_QK


def _greatest(scores_QC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What topk gives; of scores that are equal to the last of them, others may be chosen.

    On CPU topk takes most of the time of a search, so it sees few columns: the greatest of each group of _GROUP, and
    then the k groups where these are best. Any other group has k scores outside it that are as good as its best.
    """
    Q, C = scores_QC.shape
    columns = C // _GROUP  # column j stands for the group j, j + columns, j + 2 columns, ...
    if scores_QC.device.type != "cpu" or columns < _FEW * k:
        return scores_QC.topk(k, dim=1)
    greatest = scores_QC[:, : _GROUP * columns].unflatten(1, (_GROUP, columns)).amax(1)
    group_QK = greatest.topk(k, dim=1, sorted=False).indices
    place = (group_QK[:, None] + torch.arange(0, _GROUP * columns, columns)[:, None]).flatten(1)
    place = torch.cat([place, torch.arange(_GROUP * columns, C).expand(Q, -1)], 1)
    values, best_QK = scores_QC.gather(1, place).topk(k, dim=1)
    return values, place.gather(1, best_QK)


def _ordered(scores_QK: Tensor, ids_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Best first; of equal scores the smaller id."""
    by_id = ids_QK.argsort(dim=1, stable=True)
    ids_QK, scores_QK = ids_QK.gather(1, by_id), scores_QK.gather(1, by_id)
    by_score = scores_QK.argsort(dim=1, descending=True, stable=True)
    return scores_QK.gather(1, by_score), ids_QK.gather(1, by_score)


def _smallest_of_last(scores_QC: Tensor, ids_QC: Tensor, scores_QK: Tensor, ids_QK: Tensor) -> Tensor:
    """ids_QK, but of the scores that are equal to the last of a row the smallest ids. scores_QK: best first."""
    last_Q1 = scores_QK[:, -1:]
    row, column = (scores_QC == last_Q1).nonzero(as_tuple=True)
    equal = ids_QC[row, column]
    by_id = equal.argsort()
    order = by_id[row[by_id].argsort(stable=True)]
    row, equal = row[order], equal[order]
    first_Q = (scores_QK != last_Q1).sum(1)  # NaN, which is best, is not equal
    count_Q = row.bincount(minlength=len(scores_QK))
    place = torch.arange(len(row), device=row.device) + (first_Q - count_Q.cumsum(0) + count_Q)[row]
    inside = place < ids_QK.shape[1]
    return ids_QK.index_put((row[inside], place[inside]), equal[inside])

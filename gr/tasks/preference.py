"""Losses of pairs of items of which a user liked one better: reward with a margin, DPO and S-DPO.

The score of an item is similarity.scale x <query, item>: log p(item | history) but for its normaliser. The normaliser
is one number for a history, so it cancels in every difference of scores, and no softmax over the corpus is computed.

P positions with a pair, K rejected items of each, slot 0 of 1 + K is the chosen item; T tokens, Q queries, C items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.batch import Movable, PreferenceBatch
from gr.config.preference import DPOLoss, RewardLoss, SDPOLoss
from gr.dist import World


@dataclass(frozen=True)
class Pairs(Movable):
    """The compared items of a step, each looked up once.

    ids_N: int64, distinct. place_P: int64, the token whose history the items of a position follow. item_P1K: int64,
    index into ids_N of the chosen item and of the rejected ones. gap_PK: as PreferenceBatch has it.
    """

    ids_N: Tensor
    place_P: Tensor
    item_P1K: Tensor
    gap_PK: Tensor

    @classmethod
    def of(cls, batch: PreferenceBatch) -> "Pairs":
        place_P = batch.gap_TK[:, 0].nonzero().squeeze(1)
        gap_PK, chosen_P1 = batch.gap_TK[place_P], batch.target_ids_T[place_P, None]
        rejected_PK = batch.rejected_TK[place_P].where(gap_PK > 0, chosen_P1)
        ids_N, item_P1K = torch.cat([chosen_P1, rejected_PK], 1).unique(return_inverse=True)
        return cls(ids_N, place_P, item_P1K, gap_PK)


def preference_loss(
    scores_P1K: Tensor, reference_P1K: Tensor, gap_PK: Tensor, loss: RewardLoss | DPOLoss | SDPOLoss
) -> Tensor:
    """The loss of each position, [P], in nats. reference_P1K: the scores of the reference, which reward does not read.

    A rejected item counts where its gap is above 0; every position has one.
    """
    is_rejected_PK = gap_PK > 0
    match loss:
        case RewardLoss(margins=margins):
            return _mean(reward_loss(scores_P1K, margin_of(gap_PK, margins).to(scores_P1K)), is_rejected_PK)
        case DPOLoss(beta=beta):
            return _mean(dpo_loss(scores_P1K - reference_P1K, beta), is_rejected_PK)
        case SDPOLoss(beta=beta):
            return sdpo_loss(scores_P1K - reference_P1K, is_rejected_PK, beta)


def reward_loss(scores_P1K: Tensor, margin_PK: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), [P, K] (arXiv 2307.09288, Eq. 2)."""
    return -F.logsigmoid(scores_P1K[:, :1] - scores_P1K[:, 1:] - margin_PK)


def dpo_loss(gains_P1K: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta x (gain of chosen - gain of rejected)), [P, K] (arXiv 2305.18290, Eq. 7).

    gains_P1K: score minus the reference's, so beta x gain is DPO's implicit reward, but for what cancels.
    """
    return -F.logsigmoid(beta * (gains_P1K[:, :1] - gains_P1K[:, 1:]))


def sdpo_loss(gains_P1K: Tensor, is_rejected_PK: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-log sum over rejected of exp(beta x (gain of rejected - gain of chosen))), [P] (arXiv 2406.09215,
    Eq. 11). With one rejected item it is DPO.
    """
    worse_PK = beta * (gains_P1K[:, 1:] - gains_P1K[:, :1])
    return -F.logsigmoid(-worse_PK.masked_fill(~is_rejected_PK, -torch.inf).logsumexp(1))


def kl_divergence(own_QD: Tensor, reference_QD: Tensor, items_CD: Tensor, world: World) -> Tensor:
    """KL(own || reference) of the softmax over all items, in nats, [Q]: the same on every rank. Collective.

    items_CD: the rank's slice of the items, whose dot products with the queries, the same on all ranks, are the scores.
    """

    def log_softmax(queries_QD: Tensor) -> Tensor:
        scores_QC = queries_QD @ items_CD.T
        normaliser_Q = torch.stack(world.all_gather_variable(scores_QC.logsumexp(1))).logsumexp(0)
        return scores_QC - normaliser_Q[:, None]

    own_QC, reference_QC = log_softmax(own_QD), log_softmax(reference_QD)
    return torch.stack(world.all_gather_variable((own_QC.exp() * (own_QC - reference_QC)).sum(1))).sum(0)


def margin_of(gap_PK: Tensor, margins: Sequence[float]) -> Tensor:
    """float64 [P, K]: the margin of each gap from 1 on; the last is also that of larger gaps."""
    table = torch.tensor(margins, dtype=torch.float64, device=gap_PK.device)
    return table[(gap_PK - 1).clamp(0, len(margins) - 1)]


def _mean(losses_PK: Tensor, counted_PK: Tensor) -> Tensor:
    return (losses_PK * counted_PK).sum(1) / counted_PK.sum(1)

"""Losses of a policy that lists items after a history, and whose lists a reward model scores.

The policy is Plackett-Luce: the items of a list are drawn one after another, each from the softmax of the scores over
those that are left. Llama 2 tunes its policy in the same two ways, rejection sampling and PPO (arXiv 2307.09288,
section 3.2.3).

P histories, S candidates of each, L of them in its list; N distinct candidates, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.batch import Movable
from gr.dist import World

LEAST_VARIANCE = 1e-8  # of rewards, where all are equal


@dataclass(frozen=True)
class Prompts(Movable):
    """The draws of a step. noise_PS: float32, standard Gumbel. renews: whether the policy that draws becomes what the
    trained one is at this step.
    """

    noise_PS: Tensor
    renews: bool


@dataclass(frozen=True)
class Rollout(Movable):
    """The lists of a step, one a history, and how good they are.

    place_P: int64, the newest token of each history. items_ND: vectors of the candidates. item_PS: int64, rows of
    items_ND. order_PL: int64, the places in item_PS of the listed items, first to last; of rejection sampling L is 1,
    the best. Of PPO alone: old_P, the log probability of the list by the policy that drew it, in nats; reward_P, and
    expected_P, the reward model's whitened score of one item drawn by that policy, in the mean: the value head's input.
    """

    place_P: Tensor
    items_ND: Tensor
    item_PS: Tensor
    order_PL: Tensor
    old_P: Tensor | None = None
    reward_P: Tensor | None = None
    expected_P: Tensor | None = None


def drawn_lists(scores_PS: Tensor, noise_PS: Tensor, length: int) -> Tensor:
    """int64 [P, L]: lists drawn from Plackett-Luce, as places in scores_PS. noise_PS: standard Gumbel.

    The L largest of score + noise, in their order, are such a draw (Yellott, 1977).
    """
    return (scores_PS + noise_PS).topk(length, dim=1).indices


def list_log_probability(scores_PS: Tensor, order_PL: Tensor) -> Tensor:
    """log p of each list, [P], in nats: the sum over its places of score - log sum of exp(score) of what is left."""
    is_taken_PS = torch.zeros_like(scores_PS, dtype=torch.bool)
    total_P = scores_PS.new_zeros(len(scores_PS))
    for item_P1 in order_PL.split(1, dim=1):
        left_P = scores_PS.masked_fill(is_taken_PS, -torch.inf).logsumexp(1)
        total_P = total_P + scores_PS.gather(1, item_P1).squeeze(1) - left_P
        is_taken_PS = is_taken_PS.scatter(1, item_P1, True)
    return total_P


def list_score(rewards_PS: Tensor, order_PL: Tensor) -> Tensor:
    """The score of each list, [P]: the mean of its items' rewards, weighted by 1 / log2(1 + place) as NDCG does."""
    place_L = torch.arange(1, order_PL.shape[1] + 1, device=rewards_PS.device, dtype=rewards_PS.dtype)
    weight_L = 1 / torch.log2(1 + place_L)
    return rewards_PS.gather(1, order_PL) @ (weight_L / weight_L.sum())


def mean_and_deviation(score_P: Tensor, world: World) -> tuple[float, float]:
    """The mean and deviation over the histories of all ranks, by which scores are whitened. Collective."""
    count, total = world.all_reduce_sum([float(len(score_P)), float(score_P.double().sum())])
    mean = total / max(count, 1.0)
    (squares,) = world.all_reduce_sum([float((score_P.double() - mean).square().sum())])
    return mean, (squares / max(count, 1.0) + LEAST_VARIANCE) ** 0.5


def penalised_reward(score_P: Tensor, own_P: Tensor, reference_P: Tensor, beta: float) -> Tensor:
    """Score - beta x log(p(list) / reference's p(list)), [P] (arXiv 2307.09288, Eq. 4). score_P: whitened."""
    return score_P - beta * (own_P - reference_P)


def ppo_loss(own_P: Tensor, old_P: Tensor, advantage_P: Tensor, clip: float) -> Tensor:
    """-min(ratio x advantage, ratio within 1 +- clip x advantage), [P] (arXiv 1707.06347, Eq. 7).

    own_P, old_P: log probability of the list by the policy, and by the one that drew it. advantage_P: no gradient.
    """
    ratio_P = (own_P - old_P).exp()
    return -torch.minimum(ratio_P * advantage_P, ratio_P.clamp(1 - clip, 1 + clip) * advantage_P)


def rejection_loss(scores_PS: Tensor, best_P1: Tensor) -> Tensor:
    """-log p(best), [P]: the cross entropy of the candidate that the reward model likes best of those drawn."""
    return F.cross_entropy(scores_PS, best_P1.squeeze(1), reduction="none")

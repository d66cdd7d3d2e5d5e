"""The losses of lists, against cases by hand, enumeration and finite differences, in float64."""

import itertools
import math

import pytest
import torch

from gr.dist import World
from gr.tasks.policy import (
    drawn_lists,
    list_log_probability,
    list_score,
    mean_and_deviation,
    penalised_reward,
    ppo_loss,
    rejection_loss,
)


def test_the_probability_of_a_list_by_hand():
    scores = torch.tensor([[math.log(1.0), math.log(2.0), math.log(3.0)]], dtype=torch.float64)
    log_p = list_log_probability(scores, torch.tensor([[2, 0]]))
    assert log_p.item() == pytest.approx(math.log(3 / 6 * 1 / 3), abs=1e-14)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_probabilities_of_all_lists_sum_to_1(length):
    scores = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    lists = torch.tensor(list(itertools.permutations(range(4), length)))
    log_p = list_log_probability(scores.expand(len(lists), -1), lists)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_lists_are_drawn_by_their_probability():
    scores = torch.tensor([0.0, 1.0, -0.5])
    n = 20_000
    noise = -(-torch.rand(n, 3, generator=torch.Generator().manual_seed(0)).log()).log()
    drawn = drawn_lists(scores.expand(n, -1), noise, 2)
    for order in itertools.permutations(range(3), 2):
        p = list_log_probability(scores[None], torch.tensor([order])).exp().item()
        share = (drawn == torch.tensor(order)).all(1).double().mean().item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_gradients_are_finite_differences():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 6, dtype=torch.float64, generator=generator).requires_grad_()
    order = drawn_lists(scores.detach(), torch.randn(5, 6, generator=generator), 3)
    # Ratios on both sides of the clip, none at it, where the loss has a kink.
    old = list_log_probability(scores.detach(), order) + torch.tensor([0.1, -0.1, 0.5, -0.5, 0.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: list_log_probability(x, order), scores)
    assert torch.autograd.gradcheck(lambda x: ppo_loss(list_log_probability(x, order), old, advantage, 0.2), scores)
    assert torch.autograd.gradcheck(lambda x: rejection_loss(x, order[:, :1]), scores)


def test_ppo_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0], dtype=torch.float64)
    own = ratio.log().requires_grad_()
    losses = ppo_loss(own, torch.zeros(5, dtype=torch.float64), advantage, 0.2)
    # min(ratio A, clipped ratio A): what would gain by going further than the clip does not.
    assert losses.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2], abs=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), own)
    assert gradient.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2], abs=1e-12)


def test_at_the_drawing_policy_ppo_is_the_policy_gradient():
    scores = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    order = torch.tensor([[0, 1], [4, 2], [3, 0], [1, 2]])
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    own = list_log_probability(scores, order)
    (by_ppo,) = torch.autograd.grad(ppo_loss(own, own.detach(), advantage, 0.2).sum(), scores, retain_graph=True)
    (by_score,) = torch.autograd.grad(-(advantage * own).sum(), scores)
    assert torch.allclose(by_ppo, by_score, rtol=0, atol=1e-14)


def test_the_score_of_a_list_is_discounted_by_place():
    rewards = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    second = 1 / math.log2(3)
    expected = (4.0 + second * 1.0) / (1 + second)
    assert list_score(rewards, torch.tensor([[2, 0]])).item() == pytest.approx(expected, abs=1e-14)


def test_the_reward_of_llama_2(alone: World):
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    mean, deviation = mean_and_deviation(scores, alone)
    white = (scores - mean) / deviation
    assert white.tolist() == pytest.approx(((scores - 3) / math.sqrt(3.5)).tolist(), abs=1e-8)
    own, reference = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-2.0, -2.0, -1.0, -4.0]], dtype=torch.float64)
    reward = penalised_reward(white, own, reference, 0.01)
    assert (reward - white).tolist() == pytest.approx([-0.01, 0.0, 0.02, 0.0], abs=1e-14)
    assert mean_and_deviation(torch.full((3,), 2.0), alone) == (2.0, 1e-4)  # no division by 0 follows
    assert mean_and_deviation(torch.empty(0), alone) == (0.0, 1e-4)

"""The losses of pairs, against their formulas in float64."""

import math

import pytest
import torch

from gr.config.preference import DPOLoss, RewardLoss, SDPOLoss
from gr.dist import World
from gr.tasks import kl_divergence, preference_loss

P, K = 16, 3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def compared() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    own, reference = torch.randn(2, P, 1 + K, generator=generator, dtype=torch.float64) * 3
    gaps = torch.randint(0, 6, (P, K), generator=generator)
    gaps[:, 0] = gaps[:, 0].clamp(min=1)
    return own, reference, gaps


def test_reward_has_the_margins_of_llama_2(compared):
    own, reference, gaps = compared
    losses = preference_loss(own, reference, gaps, RewardLoss())
    margins = {1: 0, 2: 1 / 3, 3: 2 / 3, 4: 1, 5: 1}
    for row, gap, loss in zip(own.tolist(), gaps.tolist(), losses.tolist(), strict=True):
        each = [-math.log(sigmoid(row[0] - r - margins[g])) for r, g in zip(row[1:], gap, strict=True) if g]
        assert loss == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_dpo_is_its_formula(compared):
    own, reference, gaps = compared
    losses = preference_loss(own, reference, gaps, DPOLoss(beta=0.3))
    for row, ref, gap, loss in zip(own.tolist(), reference.tolist(), gaps.tolist(), losses.tolist(), strict=True):
        each = [
            -math.log(sigmoid(0.3 * ((row[0] - ref[0]) - (row[k] - ref[k])))) for k in range(1, 1 + K) if gap[k - 1]
        ]
        assert loss == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_sdpo_is_its_formula(compared):
    own, reference, gaps = compared
    losses = preference_loss(own, reference, gaps, SDPOLoss(beta=0.3))
    for row, ref, gap, loss in zip(own.tolist(), reference.tolist(), gaps.tolist(), losses.tolist(), strict=True):
        gains = [0.3 * (a - b) for a, b in zip(row, ref, strict=True)]
        total = sum(math.exp(gains[k] - gains[0]) for k in range(1, 1 + K) if gap[k - 1])
        assert loss == pytest.approx(-math.log(sigmoid(-math.log(total))), abs=1e-12)


def test_sdpo_of_one_rejected_item_is_dpo(compared):
    own, reference, gaps = (part.clone().requires_grad_(part.is_floating_point()) for part in compared)
    losses, gradients = [], []
    for loss in (DPOLoss(beta=0.3), SDPOLoss(beta=0.3)):
        of_first = preference_loss(own[:, :2], reference[:, :2], gaps[:, :1], loss)
        losses.append(of_first)
        gradients.append(torch.autograd.grad(of_first.sum(), own)[0])
    assert torch.allclose(*losses, rtol=0, atol=1e-14)
    assert torch.allclose(*gradients, rtol=0, atol=1e-14)


def test_an_item_that_is_not_compared_has_no_gradient(compared):
    own, reference, gaps = (part.clone() for part in compared)
    gaps[:, 1] = 0
    own.requires_grad_()
    for loss in (RewardLoss(), DPOLoss(), SDPOLoss()):
        (gradient,) = torch.autograd.grad(preference_loss(own, reference, gaps, loss).sum(), own)
        assert (gradient[:, 2] == 0).all() and gradient.isfinite().all() and (gradient[:, 0] < 0).all()


def test_divergence_is_that_of_the_softmax(alone: World):
    own, reference, items = (torch.randn(n, 8, dtype=torch.float64) for n in (5, 5, 12))
    p, q = (torch.distributions.Categorical(logits=queries @ items.T) for queries in (own, reference))
    expected = torch.distributions.kl_divergence(p, q)
    assert torch.allclose(kl_divergence(own, reference, items, alone), expected, rtol=0, atol=1e-12)

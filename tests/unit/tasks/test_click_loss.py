"""Ranking losses against their formulas of the probability, their gradients, and where the formulas break down."""

import pytest
import torch
from torch import Tensor

from gr.config.click import BCELoss, ClickLoss, MSELoss, WeightedBCELoss
from gr.tasks.losses import click_loss

WEIGHTED = WeightedBCELoss(negative_weight=0.5, positive_weight=3.0)


def of_probability(logits: Tensor, labels: Tensor, loss: ClickLoss) -> Tensor:
    """As facebookresearch/dlrm has them: nn.BCELoss or nn.MSELoss of a sigmoid; wbce scales by the label's weight."""
    p = 1 / (1 + torch.exp(-logits))
    if isinstance(loss, MSELoss):
        return (p - labels) ** 2
    weight = torch.tensor([1.0, 1.0])
    if isinstance(loss, WeightedBCELoss):
        weight = torch.tensor([loss.negative_weight, loss.positive_weight])
    return -weight.double()[labels.long()] * torch.log(torch.where(labels > 0, p, 1 - p))


@pytest.mark.parametrize("loss", [BCELoss(), WEIGHTED, MSELoss()], ids=lambda loss: loss.kind)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_equals_the_published_formula(loss: ClickLoss, dtype: torch.dtype, tolerance: float) -> None:
    logits = (torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    labels = torch.arange(64) % 2
    mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, wanted = click_loss(mine, labels, loss), of_probability(theirs, labels.double(), loss)
    assert got.dtype == dtype and got.shape == (64,)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    got.sum().backward()
    wanted.sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", [BCELoss(), WEIGHTED], ids=lambda loss: loss.kind)
def test_cross_entropy_stays_exact_where_the_probability_rounds_to_0_or_1(loss: ClickLoss) -> None:
    logits = torch.tensor([200.0, -200.0], requires_grad=True)
    scale = (0.5, 3.0) if loss is WEIGHTED else (1.0, 1.0)
    got = click_loss(logits, torch.tensor([0.0, 1.0]), loss)
    assert got.tolist() == [200 * scale[0], 200 * scale[1]]
    got.sum().backward()
    assert logits.grad is not None and logits.grad.tolist() == [scale[0], -scale[1]]


def test_weights_of_one_are_no_weights() -> None:
    logits, labels = torch.randn(9, dtype=torch.float64), torch.tensor([0.0, 1, 0.25] * 3)
    plain = click_loss(logits, labels, BCELoss())
    torch.testing.assert_close(click_loss(logits, labels, WeightedBCELoss()), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [BCELoss(), WEIGHTED, MSELoss()], ids=lambda loss: loss.kind)
def test_a_narrow_logit_is_widened_before_and_a_bad_one_stays_visible(loss: ClickLoss) -> None:
    narrow = torch.tensor([1.5, -0.25], dtype=torch.bfloat16)
    labels = torch.tensor([1.0, 0.0])
    assert torch.equal(click_loss(narrow, labels, loss), click_loss(narrow.float(), labels, loss))
    assert click_loss(torch.tensor([torch.nan, 0.0]), labels, loss).isnan().tolist() == [True, False]

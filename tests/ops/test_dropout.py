"""The rate, scale and independence of the cheap dropout mask."""

import pytest
import torch

from gr.ops.dropout import dropout


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5])
def test_fraction_and_scale(probability):
    torch.manual_seed(0)
    out = dropout(torch.ones(1000, 401), probability, training=True)
    zeroed = float((out == 0).double().mean())
    assert abs(zeroed - probability) < 5 * (probability * (1 - probability) / out.numel()) ** 0.5
    assert abs(float(out.double().mean()) - 1) < 0.01
    assert out.unique().numel() == 2


def test_neighbours_that_share_a_draw_are_independent():
    torch.manual_seed(0)
    keep = (dropout(torch.ones(200_000, 4), 0.5, training=True) > 0).double()
    correlation = torch.corrcoef(keep.T) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.012


def test_gradient_is_the_mask():
    x = torch.randn(33, 7, requires_grad=True)
    out = dropout(x, 0.3, training=True)
    out.sum().backward()
    assert torch.equal(x.grad * x.detach(), out.detach())


def test_identity_in_evaluation_and_at_zero_and_repeats_by_seed():
    x = torch.randn(5, 3)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    torch.manual_seed(3)
    first = dropout(x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.5, training=True))
    assert dropout(torch.empty(0, 4), 0.5, training=True).shape == (0, 4)

"""Softmax attention on packed sequences against a loop over them in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.softmax_attention import softmax_attention
from tests.support.tolerances import assert_near


def definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    outputs = []
    for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        n = a.shape[0]
        scores = torch.einsum("ihd,jhd->hij", a, b) / q.shape[2] ** 0.5
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", F.softmax(scores, dim=-1), c))
    return torch.cat(outputs)


@pytest.mark.parametrize("widths", [(1, 50, 50), (2, 25, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_matches_definition(dtype: torch.dtype, widths: tuple[int, int, int]) -> None:
    lengths = [65, 0, 1, 2, 64, 0]
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    heads, width, value_width = widths
    rounded = [torch.randn(132, heads, w).to(dtype).double() for w in (width, width, value_width, value_width)]
    *references, grad = [x.requires_grad_() for x in rounded]
    q, k, v = references
    expected = definition(q, k, v, lengths)
    values = [x.detach().to(dtype).requires_grad_() for x in references]
    q, k, v = values
    out = softmax_attention(q, k, v, offsets, max_length=100)
    actual = [out, *torch.autograd.grad(out, values, grad.to(dtype))]
    for value, reference in zip(actual, [expected, *torch.autograd.grad(expected, references, grad)], strict=True):
        assert_near(value, reference, dtype, "softmax attention")


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_tokens(offsets: list[int]) -> None:
    x = torch.zeros(0, 2, 4)
    assert softmax_attention(x, x, x, torch.tensor(offsets), max_length=3).shape == (0, 2, 4)


def test_too_long() -> None:
    x = torch.zeros(5, 1, 4)
    with pytest.raises(ValueError, match="max_length = 4, but a sequence has 5 tokens"):
        softmax_attention(x, x, x, torch.tensor([0, 5]), max_length=4)


def test_dropout_zero_weight_path_equals_the_fused_one() -> None:
    """A probability that rounds to zero takes the unfused path and gives the same numbers as no dropout."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, 4) for _ in range(3))
    offsets = torch.tensor([0, 3, 3, 9])
    plain = softmax_attention(q, k, v, offsets, max_length=8)
    unfused = softmax_attention(q, k, v, offsets, max_length=8, dropout=1e-9)
    torch.testing.assert_close(unfused, plain)
    assert not torch.allclose(softmax_attention(q, k, v, offsets, max_length=8, dropout=0.5), plain)

"""Linear cross-entropy against F.cross_entropy on the full logits, in float64."""

import pytest
import torch
from torch import Tensor

from gr.ops.linear_cross_entropy import linear_cross_entropy
from gr.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.support.tolerances import assert_near


def inputs(
    tokens: int, items: int, width: int, dtype: torch.dtype, biased: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    tensors = [torch.randn(tokens, width).to(dtype).double(), torch.randn(items, width).to(dtype).double()]
    if biased:
        tensors.append(torch.randint(1, 50, (items,)).double().log())
    return tensors, torch.randint(0, items, (tokens,)), torch.randn(tokens).double()


def with_gradients(loss: Tensor, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tensors, grad.to(loss.dtype))]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_matches_cross_entropy(dtype: torch.dtype, chunk: int, biased: bool) -> None:
    tensors, target, grad = inputs(150, 90, 13, torch.float32, biased)
    references = [x.clone().requires_grad_() for x in tensors]
    expected = linear_cross_entropy_reference(
        references[0], references[1], target, scale=0.7, bias_K=references[2] if biased else None
    )
    values = [x.to(dtype).requires_grad_() for x in tensors]
    loss = linear_cross_entropy(
        values[0], values[1], target, scale=0.7, bias_K=values[2] if biased else None, chunk=chunk
    )
    assert loss.dtype == dtype
    for name, actual, reference in zip(
        ("loss", "dqueries", "ditems", "dbias"),
        with_gradients(loss, values, grad),
        with_gradients(expected, references, grad),
        strict=False,
    ):
        assert_near(actual, reference, dtype, name)


def test_bfloat16_is_computed_in_float32() -> None:
    tensors, target, grad = inputs(50, 40, 16, torch.bfloat16, False)
    references = [x.clone().requires_grad_() for x in tensors]
    expected = with_gradients(
        linear_cross_entropy_reference(references[0], references[1], target, scale=1.0), references, grad
    )
    values = [x.bfloat16().requires_grad_() for x in tensors]
    loss = linear_cross_entropy(values[0], values[1], target, scale=1.0)
    assert_near(loss, expected[0], torch.float32, "loss")
    for actual, reference in zip(torch.autograd.grad(loss, values, grad.float()), expected[1:], strict=True):
        assert_near(actual, reference, torch.bfloat16, "gradient")


def test_large_logits_do_not_overflow() -> None:
    queries, items = torch.full((3, 1), 1000.0), torch.tensor([[1.0], [0.0], [-1.0]])
    loss = linear_cross_entropy(queries, items, torch.tensor([0, 1, 2]), scale=1.0)
    assert loss.tolist() == [0.0, 1000.0, 2000.0]


def test_a_small_loss_keeps_its_digits() -> None:
    """log(sum) and the target's logit, both near 60, would cancel to an error of 1e-6."""
    queries, items, target = torch.tensor([[1.0, 0.0]]), torch.tensor([[60.0, 1.0], [52.0, 0.0]]), torch.tensor([0])
    expected = linear_cross_entropy_reference(queries.double(), items.double(), target, scale=1.0)
    loss = linear_cross_entropy(queries, items, target, scale=1.0)
    assert abs(float(loss) - float(expected)) < 1e-7


def test_multiplicities_are_a_bias() -> None:
    """An item that occurs three times in the table weighs as one item with a bias of log 3."""
    items, queries, target = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    bias = torch.tensor([3.0, 1, 2, 1]).log()
    repeated = linear_cross_entropy(queries, items[[0, 1, 2, 3, 0, 0, 2]], target, scale=2.0)
    biased = linear_cross_entropy(queries, items, target, scale=2.0, bias_K=bias)
    assert_near(biased, repeated.double() + bias[target].neg(), torch.float32, "loss")


def test_no_tokens_and_only_needed_gradients() -> None:
    items = torch.randn(4, 6, requires_grad=True)
    loss = linear_cross_entropy(torch.zeros(0, 6), items, torch.zeros(0, dtype=torch.int64), scale=1.0)
    assert loss.shape == (0,)
    assert torch.equal(torch.autograd.grad(loss.sum(), items)[0], torch.zeros(4, 6))


def test_wrong_arguments() -> None:
    queries, items, target = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="queries_TD and items_KD"):
        linear_cross_entropy(queries, torch.zeros(5, 4), target, scale=1.0)
    with pytest.raises(ValueError, match=r"bias_K must be \[5\], not \[4\]"):
        linear_cross_entropy(queries, items, target, scale=1.0, bias_K=torch.zeros(4))
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(queries, items, target, scale=1.0, chunk=0)
    with pytest.raises(IndexError, match=r"\[0, 5\).* found 5"):
        linear_cross_entropy(queries, items, torch.tensor([0, 5]), scale=1.0)
    with pytest.raises(IndexError, match="found -1"):
        linear_cross_entropy(queries, items, torch.tensor([0, -1]), scale=1.0)

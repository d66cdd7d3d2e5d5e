"""Dot interaction: the C++ against the definition, in values and gradients, and by hand."""

import pytest
import torch
from torch import Tensor

from gr.ops.backend import Backend, force_backend
from gr.ops.dot_interaction import dot_interaction


def outcome(backend: Backend, dense: Tensor | None, vectors: Tensor, diagonal: int) -> list[Tensor]:
    """The output and the gradients of the inputs."""
    inputs = [each.clone().requires_grad_() for each in (dense, vectors) if each is not None]
    with force_backend(backend):
        out = dot_interaction(None if dense is None else inputs[0], inputs[-1], diagonal=diagonal)
        weight = torch.arange(float(out.numel())).view_as(out).cos()
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("diagonal", [0, 1])
@pytest.mark.parametrize(("B", "F", "D"), [(5, 26, 64), (3, 1, 4), (2, 8, 7), (19, 12, 20), (1, 33, 100), (0, 3, 8)])
@pytest.mark.parametrize("has_dense", [True, False])
def test_native_equals_the_definition(B: int, F: int, D: int, diagonal: int, has_dense: bool) -> None:
    dense, vectors = torch.randn(B, D) if has_dense else None, torch.randn(B, F, D)
    native, plain = (outcome(backend, dense, vectors, diagonal) for backend in ("native", "torch"))
    for got, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_gradients_are_those_of_differences(backend: Backend) -> None:
    """By central differences in float32, of a sum of random weights times the products."""
    dense, vectors, weight = torch.randn(1, 3), torch.randn(1, 2, 3), torch.randn(1, 6)

    def loss(dense: Tensor, vectors: Tensor) -> Tensor:
        with force_backend(backend):
            return (dot_interaction(dense, vectors, diagonal=1) * weight).sum()

    gradients = torch.autograd.functional.jacobian(loss, (dense, vectors))
    for index, (each, gradient) in enumerate(zip((dense, vectors), gradients, strict=True)):
        step = torch.zeros_like(each)
        step.view(-1)[1] = 0.01
        moved = [[dense, vectors] for _ in range(2)]
        moved[0][index], moved[1][index] = each + step, each - step
        difference = (loss(*moved[0]) - loss(*moved[1])) / 0.02
        assert float(gradient.reshape(-1)[1]) == pytest.approx(float(difference), abs=1e-3)


def test_what_lies_around_the_vectors_is_not_read(backend: Backend) -> None:
    """A view of a buffer of NaN, as the columns of a lookup beside others are."""
    buffer = torch.full((4, 9, 12), torch.nan)
    buffer[:, 2:7, :10] = torch.randn(4, 5, 10)
    dense, vectors = buffer[:, 2, :10], buffer[:, 3:7, :10]
    for got, expected in zip(
        outcome(backend, dense, vectors, 1), outcome("torch", dense.clone(), vectors.clone(), 1), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_number_that_is_not_one_stays_in_its_example(backend: Backend) -> None:
    vectors = torch.randn(3, 4, 8)
    vectors[1, 2, 5] = torch.nan
    with force_backend(backend):
        out = dot_interaction(None, vectors, diagonal=1)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().tolist() == [False, True, False, True, False, True]


def test_other_dtypes_take_the_definition() -> None:
    vectors = torch.randn(2, 3, 4).double().requires_grad_()
    dense = torch.randn(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: dot_interaction(x, v, diagonal=1), (dense, vectors))

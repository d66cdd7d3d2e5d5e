"""The feed-forward half of a Llama layer in C++ against its composition in float64: values and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.ops.backend import force_backend
from gr.ops.norm_swiglu import norm_swiglu
from tests.support.operators import draw, gradients
from tests.support.tolerances import RELATIVE_ERROR, relative_error

EPS = 1e-3


def composed(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, residual: bool) -> Tensor:
    normed = F.rms_norm(x, norm.shape, norm, EPS)
    y = (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return x + y if residual else y


def inputs(rows: int, dim: int, hidden: int) -> list[Tensor]:
    shapes = (rows, dim), (dim,), (hidden, dim), (hidden, dim), (dim, hidden)
    return [draw(*shape, dtype=torch.float32) / scale for shape, scale in zip(shapes, (1, 1, 3, 3, 3), strict=True)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rows", "dim", "hidden"), [(0, 20, 12), (1, 20, 12), (65, 20, 30), (1100, 16, 24)])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_is_the_composition(backend: str, rows: int, dim: int, hidden: int, residual: bool) -> None:
    """A block that is short, widths that are no multiple of a vector's, and more rows than a task has."""
    exact = [x.requires_grad_() for x in inputs(rows, dim, hidden)]
    grad = draw(rows, dim, dtype=torch.float32)
    values = [x.detach().float().requires_grad_() for x in exact]
    with force_backend(backend):  # type: ignore[arg-type]
        results = gradients(norm_swiglu(*values, EPS, residual=residual), values, grad.float())
    expected = gradients(composed(*exact, residual), exact, grad)
    for value, reference in zip(results, expected, strict=True):
        assert value.shape == reference.shape
        assert not rows or relative_error(value, reference) < RELATIVE_ERROR[torch.float32]


def test_has_the_same_bits_on_two_threads_and_of_a_row_among_others() -> None:
    values = [x.float().requires_grad_() for x in inputs(2100, 24, 40)]
    grad = draw(2100, 24, dtype=torch.float32).float()
    threads = torch.get_num_threads()
    results = []
    with force_backend("native"):
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(gradients(norm_swiglu(*values, EPS, residual=True), values, grad))
        torch.set_num_threads(threads)
        with torch.no_grad():
            part = norm_swiglu(values[0][70:73], *values[1:], EPS, residual=True)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert torch.equal(part, results[0][0][70:73])


def test_wrong_arguments() -> None:
    x, norm, gate, up, down = (each.float() for each in inputs(3, 4, 6))
    with pytest.raises(ValueError, match=r"up_FD must be \[6, 4\], not \[4, 6\]"):
        norm_swiglu(x, norm, gate, up.T, down, EPS, residual=True)
    with pytest.raises(ValueError, match=r"norm_weight_D must be \[4\]"):
        norm_swiglu(x, norm[:2], gate, up, down, EPS, residual=True)

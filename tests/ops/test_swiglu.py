"""SwiGLU's gate in C++ against torch's composition: values and both gradients."""

import pytest
import torch
from torch.nn import functional as F

from gr.ops.backend import force_backend
from gr.ops.swiglu import swiglu

SHAPES = [(0, 20), (1, 3), (7, 20), (300, 17)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 0)])
def test_equals_torchs(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """bf16 is rounded once, where torch rounds after each step; float64 is torch's own."""
    torch.manual_seed(0)
    inputs = [4 * torch.randn(shape, dtype=dtype) for _ in range(2)]
    grad = torch.randn(shape, dtype=dtype)
    results = []
    for gate in (swiglu, lambda gate, up: F.silu(gate) * up):
        leaves = [each.clone().requires_grad_() for each in inputs]
        out = gate(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


def test_large_values_saturate_and_views_are_taken() -> None:
    both = torch.tensor([[-200.0, -3.0, 0.0, 3.0, 200.0] * 8]).T
    gate, up = both.expand(40, 6).chunk(2, dim=1)
    with force_backend("native"):
        torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    assert torch.isnan(swiglu(torch.tensor([torch.nan]), torch.ones(1))).all()

"""RMSNorm against torch's own, which composes it."""

from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from gr.ops.backend import force_backend
from gr.ops.rms_norm import rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0)])
@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_equals_torchs(dtype: torch.dtype, tolerance: float, rows: int, backend: Literal["native", "torch"]) -> None:
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(rows, 20, dtype=dtype),
        torch.randn(20, dtype=dtype),
        torch.randn(rows, 20, dtype=dtype),
    )
    results = []
    for norm in (rms_norm, lambda x, weight, eps: F.rms_norm(x, (20,), weight, eps)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with force_backend(backend):
            out = norm(*leaves, 1e-3)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


def test_rows_of_a_wider_tensor_and_more_dims() -> None:
    x = torch.randn(3, 4, 40)[..., :20].requires_grad_()
    weight, grad = torch.randn(20), torch.randn(20, 4, 3).transpose(0, 2)
    for ours, torchs in zip(
        (out := rms_norm(x, weight, 1e-3), *torch.autograd.grad(out, x, grad)),
        (out := F.rms_norm(x, (20,), weight, 1e-3), *torch.autograd.grad(out, x, grad)),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, rtol=2e-6, atol=2e-6)

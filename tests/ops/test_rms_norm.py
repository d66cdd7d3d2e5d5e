"""RMSNorm against torch's own, which composes it."""

import pytest
import torch
from torch.nn import functional as F

from gr.ops.rms_norm import rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0)])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_equals_torchs(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(rows, 20, dtype=dtype),
        torch.randn(20, dtype=dtype),
        torch.randn(rows, 20, dtype=dtype),
    )
    results = []
    for norm in (rms_norm, lambda x, weight, eps: F.rms_norm(x, (20,), weight, eps)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = norm(*leaves, 1e-3)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)

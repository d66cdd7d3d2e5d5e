"""The gate of a SwiGLU feed-forward part, of tensors of one shape."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr.ops.backend import backend_for

__all__ = ["swiglu"]

_NATIVE = torch.float32, torch.bfloat16


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Gradients: both. One pass each way on CPU in fp32 and bf16.

    Source: Shazeer 2020 (arXiv 2002.05202), Eq. 6.
    """
    native = gate.device.type == "cpu" and gate.dtype == up.dtype and gate.dtype in _NATIVE
    if native and backend_for(gate.device) == "native":
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.ops.gr.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.gr.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)

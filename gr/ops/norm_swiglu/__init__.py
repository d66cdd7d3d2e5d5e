"""The feed-forward half of a Llama layer as one autograd node, in float32 on CPU: RMS norm, SwiGLU, residual.

T packed tokens, D model width, F hidden width. A call keeps x [T, D], one number a token, and the products with the
first two matrices [T, 2 F] for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr.ops.backend import fuses_layers
from gr.ops.checks import check_matrix, check_parameter
from gr.ops.rms_norm import rms_norm
from gr.ops.swiglu import swiglu

__all__ = ["norm_swiglu"]


def norm_swiglu(
    x_TD: Tensor, norm_weight_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, eps: float, *, residual: bool
) -> Tensor:
    """W_down (silu(W_gate n) * W_up n) with n the RMS norm of x, [T, D]; x is added where it is `residual`.

    Every tensor gets a gradient. What does not fit the C++ is composed of rms_norm, products and swiglu. The backward
    pass computes n and the gated product again instead of keeping them.
    Raises ValueError if shapes, dtypes or devices do not fit.
    Source: Shazeer 2020 (arXiv 2002.05202), Eq. 6; Zhang and Sennrich 2019 (arXiv 1910.07467), Eq. 4.
    """
    check_matrix("x_TD", x_TD)
    dim, hidden = x_TD.shape[1], gate_FD.shape[0]
    for name, parameter, shape in (
        ("norm_weight_D", norm_weight_D, (dim,)),
        ("gate_FD", gate_FD, (None, dim)),
        ("up_FD", up_FD, (hidden, dim)),
        ("down_DF", down_DF, (dim, hidden)),
    ):
        check_parameter(name, parameter, shape, x_TD.device)
    weights = norm_weight_D, gate_FD, up_FD, down_DF
    if fuses_layers(x_TD, 3 * dim * hidden) and all(weight.dtype == torch.float32 for weight in weights):
        return _Native.apply(x_TD.contiguous(), *(weight.contiguous() for weight in weights), eps, residual)
    normed_TD = rms_norm(x_TD, norm_weight_D, eps)
    y_TD = F.linear(swiglu(F.linear(normed_TD, gate_FD), F.linear(normed_TD, up_FD)), down_DF)
    return x_TD + y_TD if residual else y_TD


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        gate_FD: Tensor,
        up_FD: Tensor,
        down_DF: Tensor,
        eps: float,
        residual: bool,
    ) -> Tensor:
        inputs = x_TD, norm_weight_D, gate_FD, up_FD, down_DF
        y_TD, products_TG, scale_T = torch.ops.gr.norm_swiglu(*inputs, eps, residual)
        ctx.save_for_backward(*inputs, products_TG, scale_T)
        ctx.residual = residual
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, dnorm_D, dgate_up_DG, ddown_DF = torch.ops.gr.norm_swiglu_backward(
            grad_TD.contiguous(), *ctx.saved_tensors, ctx.residual
        )
        dgate_DF, dup_DF = dgate_up_DG.chunk(2, dim=1)
        return dx_TD, dnorm_D, dgate_DF.T, dup_DF.T, ddown_DF, None, None

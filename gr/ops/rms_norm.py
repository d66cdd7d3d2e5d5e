"""RMSNorm in few passes over memory on CPU, where torch composes it of a dozen. T rows, D width."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr.ops.backend import backend_for

__all__ = ["rms_norm"]


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of x, computed in float32 or better.

    Gradients: x, weight. Source: Zhang and Sennrich 2019 (arXiv 1910.07467), Eq. 4.
    """
    if x_TD.device.type != "cpu" or x_TD.dtype not in (torch.float32, torch.float64) or weight_D.dtype != x_TD.dtype:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    if x_TD.dtype == torch.float32 and backend_for(x_TD.device) == "native":
        return _NativeRMSNorm.apply(x_TD, weight_D, eps)
    return _RMSNorm.apply(x_TD, weight_D, eps)


class _NativeRMSNorm(torch.autograd.Function):
    """Keeps x and one number a row, in the C++ of rms_norm.cpp."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rows_TD, weight_D = x_TD.reshape(-1, x_TD.shape[-1]).contiguous(), weight_D.contiguous()
        out_TD, scale_T = torch.ops.gr.rms_norm(rows_TD, weight_D, eps)
        ctx.save_for_backward(rows_TD, weight_D, scale_T)
        return out_TD.view(x_TD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_TD, weight_D, scale_T = ctx.saved_tensors
        rows_grad_TD = grad.reshape(rows_TD.shape).contiguous()
        dx_TD, dweight_D = torch.ops.gr.rms_norm_backward(rows_grad_TD, rows_TD, weight_D, scale_T)
        return dx_TD.view(grad.shape), dweight_D, None


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        scale_T1 = (norm_T1.square_() / x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return (x_TD * scale_T1).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        normed_TD = x_TD * scale_T1
        product_TD = grad_TD * normed_TD
        along_T1 = (product_TD @ weight_D)[:, None] / x_TD.shape[-1]
        dx_TD = (grad_TD * weight_D).addcmul_(normed_TD, along_T1, value=-1).mul_(scale_T1)
        return dx_TD, product_TD.sum(0), None

"""Layer norm, projection and SiLU as one autograd node, in plain torch on any device. Letters as in reference.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr.ops.autocast import product_dtype


def norm_linear_fused(
    x_TD: Tensor,
    weight_DO: Tensor,
    bias_O: Tensor | None,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor:
    """Arguments are those of norm_linear."""
    dtype = product_dtype(x_TD)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _NormLinear.apply(x_TD, weight_DO, bias_O, norm_weight_D, norm_bias_D, eps, silu, dtype)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed x in the dtype of x, its mean and 1 / its standard deviation."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return torch.native_layer_norm(x, [x.shape[1]], weight, bias, eps)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        silu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        normed, mean, rstd = _norm(x, norm_weight, norm_bias, eps)
        z = normed.to(dtype) @ weight.to(dtype)
        if bias is not None:
            z += bias.to(dtype)
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, mean, rstd, z if silu else None)
        ctx.eps, ctx.dtype = eps, dtype
        return F.silu(z) if silu else z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, norm_weight, norm_bias, mean, rstd, z = ctx.saved_tensors
        dz = grad if z is None else torch.ops.aten.silu_backward(grad, z)
        normed = _norm(x, norm_weight, norm_bias, ctx.eps)[0].to(ctx.dtype)
        dweight = (normed.T @ dz).to(weight.dtype)
        dbias = None if bias is None else dz.sum(0).to(bias.dtype)
        dnormed = (dz @ weight.to(ctx.dtype).T).to(x.dtype)
        affine = [None if p is None else p.to(x.dtype) for p in (norm_weight, norm_bias)]
        needed = [True, *(p is not None for p in affine)]
        dx, *daffine = torch.ops.aten.native_layer_norm_backward(dnormed, x, [x.shape[1]], mean, rstd, *affine, needed)
        dnorm = (None if p is None else dp.to(p.dtype) for p, dp in zip((norm_weight, norm_bias), daffine, strict=True))
        return dx, dweight, dbias, *dnorm, None, None, None

"""Layer norm, projection and SiLU in one step of the graph. Letters as in the package."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """That of products: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def norm_linear_apply(
    x_TD: Tensor,
    weight_DO: Tensor,
    bias_O: Tensor | None,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor:
    dtype = compute_dtype(x_TD)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _NormLinear.apply(x_TD, weight_DO, bias_O, norm_weight_D, norm_bias_D, eps, silu, dtype)


def norm_linear_reference(
    x_TD: Tensor,
    weight_DO: Tensor,
    bias_O: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    norm_bias_D: Tensor | None = None,
    *,
    eps: float,
    silu: bool = False,
) -> Tensor:
    """The definition. Differentiable; any float dtype."""
    z_TO = F.layer_norm(x_TD, x_TD.shape[1:], norm_weight_D, norm_bias_D, eps) @ weight_DO
    z_TO = z_TO if bias_O is None else z_TO + bias_O
    return F.silu(z_TO) if silu else z_TO


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed x, in its dtype; mean and 1 / standard deviation."""
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

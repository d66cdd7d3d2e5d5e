"""Norm, projection and SiLU as one autograd node. Letters as in reference.py."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gr.ops.autocast import product_dtype
from gr.ops.backend import fuses_layers
from gr.ops.norm_linear.reference import Norm, norm_linear_reference

NORMS = get_args(Norm)  # in the order of norm_linear.cpp


def norm_linear_fused(
    x_TD: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    silu: bool,
    splits: Sequence[int],
    norm: Norm,
    residual_TO: Tensor | None,
) -> tuple[Tensor, ...]:
    """Arguments are those of norm_linear. parameters: weight, bias, and the norm's weight and bias."""
    dtype, fuses = product_dtype(x_TD), fuses_layers(x_TD, parameters[0].numel())
    with torch.autocast(x_TD.device.type, enabled=False):
        if fuses and (residual_TO is None or residual_TO.dtype == dtype):
            single = (None if p is None else p.float().contiguous() for p in (*parameters, residual_TO))
            return _Native.apply(x_TD.contiguous(), *single, eps, silu, splits, NORMS.index(norm))
        if norm == "layer" and residual_TO is None:
            return _NormLinear.apply(x_TD, *parameters, eps, silu, dtype, splits)
    out_TO = norm_linear_reference(x_TD, *parameters, eps=eps, silu=silu, norm=norm, residual_TO=residual_TO)
    return out_TO.split(list(splits), dim=1)


class _Native(torch.autograd.Function):
    """The gradients of parts of the output are never put side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        silu: bool,
        splits: Sequence[int],
        norm: int,
    ) -> tuple[Tensor, ...]:
        out, z = torch.ops.gr.norm_linear(x, weight, bias, norm_weight, norm_bias, eps, silu, norm, residual)
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, z if silu else None)
        ctx.eps, ctx.norm, ctx.residual = eps, norm, residual is not None
        return out.split(list(splits), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = [grad if grad.stride(1) == 1 else grad.contiguous() for grad in grads]
        saved = ctx.saved_tensors  # once: checkpointing makes them anew
        dx, dweight, dbias, dnorm_2D = torch.ops.gr.norm_linear_backward(rows, *saved, ctx.eps, ctx.norm)
        _, _, bias, *affine, _ = saved
        dnorm = [None if p is None else dnorm_2D[n] for n, p in enumerate(affine)]
        dresidual = (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)) if ctx.residual else None
        return dx, dweight, None if bias is None else dbias, *dnorm, dresidual, None, None, None, None


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
        splits: Sequence[int],
    ) -> tuple[Tensor, ...]:
        normed, mean, rstd = _norm(x, norm_weight, norm_bias, eps)
        z = normed.to(dtype) @ weight.to(dtype)
        if bias is not None:
            z += bias.to(dtype)
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, mean, rstd, z if silu else None)
        ctx.eps, ctx.dtype = eps, dtype
        return (F.silu(z) if silu else z).split(list(splits), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.cat(grads, dim=1)
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
        return dx, dweight, dbias, *dnorm, None, None, None, None

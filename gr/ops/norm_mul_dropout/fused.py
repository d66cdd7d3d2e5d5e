"""Norm, gate, dropout and output projection as one autograd node. Letters as in reference.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.ops.autocast import product_dtype
from gr.ops.backend import Backend, backend_for
from gr.ops.norm_mul_dropout.reference import Gate, norm_mul_dropout_reference

_Affine = tuple[Tensor | None, Tensor | None]


def norm_mul_dropout_linear_fused(
    u_TU: Tensor,
    a_TU: Tensor,
    weight_YD: Tensor,
    bias_D: Tensor | None,
    norm_weight_U: Tensor | None,
    norm_bias_U: Tensor | None,
    gate: Gate,
) -> Tensor:
    """Arguments are those of norm_mul_dropout_linear, the settings in `gate`."""
    dtype = product_dtype(u_TU)
    with torch.autocast(u_TU.device.type, enabled=False):
        values = (u_TU.to(dtype), a_TU.to(dtype))
        return _NormMulDropoutLinear.apply(*values, weight_YD, bias_D, norm_weight_U, norm_bias_U, gate.seeded())


def _path(u: Tensor) -> Backend:
    return "torch" if u.dtype == torch.float64 else backend_for(u.device)


def _operand(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _numbers(gate: Gate) -> tuple[int | float | bool, ...]:
    return gate.groups, gate.eps, gate.silu, gate.concat, gate.dropout, gate.seed


def _gated(path: Backend, u: Tensor, a: Tensor, affine: _Affine, gate: Gate) -> Tensor:
    match path:
        case "native":
            return torch.ops.gr.norm_mul_dropout(
                u, a, *(None if p is None else p.float() for p in affine), *_numbers(gate)
            )
        case "triton":
            from gr.ops.norm_mul_dropout.triton import norm_mul_dropout_triton  # CPU machines have no triton

            return norm_mul_dropout_triton(u, a, affine, gate)
        case "torch":
            return norm_mul_dropout_reference(u, a, *affine, gate)


def _gated_backward(
    path: Backend, dy: Tensor, u: Tensor, a: Tensor, affine: _Affine, gate: Gate
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """y again; the gradients of u, a, and of the weight and bias of the norm, the latter two in float32 or better."""
    match path:
        case "native":
            norms = (None if p is None else p.float() for p in affine)
            y, du, da, dnorm_2U = torch.ops.gr.norm_mul_dropout_backward(dy, u, a, *norms, *_numbers(gate))
        case "triton":
            from gr.ops.norm_mul_dropout.triton import norm_mul_dropout_backward_triton

            y = _gated(path, u, a, affine, gate)
            du, da, dnorm_2U = norm_mul_dropout_backward_triton(dy, u, a, affine, gate)
        case "torch":
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (u, a, *affine) if x is not None]
                weight, bias = inputs[2:] or (None, None)
                y = norm_mul_dropout_reference(inputs[0], inputs[1], weight, bias, gate)
            du, da, *dnorm = torch.autograd.grad(y, inputs, dy)
            return y.detach(), du, da, *(dnorm or (None, None))
    return y, du, da, *((None, None) if affine[0] is None else dnorm_2U.unbind())


class _NormMulDropoutLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        gate: Gate,
    ) -> Tensor:
        ctx.save_for_backward(u, a, weight, bias, norm_weight, norm_bias)
        # The backward pass may run in another thread, where force_backend has no effect.
        ctx.gate, ctx.path = gate, _path(u)
        y = _gated(ctx.path, _operand(u), _operand(a), (norm_weight, norm_bias), gate)
        out = y @ weight.to(y.dtype)
        return out if bias is None else out.add_(bias.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, a, weight, bias, *affine = ctx.saved_tensors
        u_rows, a_rows, norms = _operand(u), _operand(a), (affine[0], affine[1])
        dbias = None if bias is None else grad.sum(0).to(bias.dtype)
        dy = (grad @ weight.to(grad.dtype).T).contiguous()
        y, du, da, *dnorms = _gated_backward(ctx.path, dy, u_rows, a_rows, norms, ctx.gate)
        dweight = (y.T @ grad).to(weight.dtype)
        cast = (None if p is None or dp is None else dp.to(p.dtype) for p, dp in zip(affine, dnorms, strict=True))
        return du, da, dweight, dbias, *cast, None

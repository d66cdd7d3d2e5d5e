"""The two halves of an HSTU layer around its attention: each one step of the graph, keeping nothing it can make again.

T packed tokens, D model width, O outputs of a projection, U width of the gate u and of the attention a (H heads of V).
Of a token and layer, norm_linear keeps x (D), and z (O) if it activates; gated_projection keeps u and a (U each).
"""

import torch
from torch import Tensor

from gr.ops.layer.gate import Gate
from gr.ops.layer.gated_projection import gated_projection_apply
from gr.ops.layer.norm_linear import norm_linear_apply

__all__ = ["gated_projection", "norm_linear"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def norm_linear(
    x_TD: Tensor,
    weight_DO: Tensor,
    *,
    bias_O: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    norm_bias_D: Tensor | None = None,
    eps: float,
    silu: bool = False,
) -> Tensor:
    """z = norm(x) weight + bias, or silu(z): the left half, with u, v, q and k side by side in one buffer.

    norm: layer norm over D, with an affine map where its two tensors are given. Returns [T, O] in the dtype of x, or
    that of autocast. Gradients: every tensor. The normed x is made again in the backward pass.
    Raises ValueError if shapes, dtypes or devices do not fit.
    Source: arXiv 2402.17152, Eq. 1, and section 3.3 for what is made again.
    """
    _check_float("x_TD", x_TD)
    _check("weight_DO", weight_DO, (x_TD.shape[1], None), x_TD)
    _check("bias_O", bias_O, (weight_DO.shape[1],), x_TD)
    _check("norm_weight_D", norm_weight_D, (x_TD.shape[1],), x_TD)
    _check("norm_bias_D", norm_bias_D, (x_TD.shape[1],), x_TD)
    return norm_linear_apply(x_TD, weight_DO, bias_O, norm_weight_D, norm_bias_D, eps, silu)


def gated_projection(
    u_TU: Tensor,
    a_TU: Tensor,
    weight_YD: Tensor,
    *,
    bias_D: Tensor | None = None,
    norm_weight_U: Tensor | None = None,
    norm_bias_U: Tensor | None = None,
    groups: int = 1,
    eps: float,
    silu: bool = False,
    concat: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """dropout(u * norm(a)) weight + bias, or of [u, a, u * norm(a)] if concat; u <- silu(u) first if silu.

    u_TU, a_TU: one dtype; rows may be strided. weight_YD: Y = U, or 3 U if concat. norm: over each of `groups` equal
    parts of a. dropout: probability, already 0 in evaluation; its mask is a function of a seed drawn from torch's
    generator, so it is not kept, and the same on every device.
    Returns [T, D] in the dtype of u, or that of autocast. Gradients: every tensor. What is projected is made again in
    the backward pass.
    Raises ValueError if shapes, dtypes or devices do not fit.
    Source: arXiv 2402.17152, Eq. 3; groups and concat from STULayer of meta-recsys/generative-recommenders.
    """
    _check_float("u_TU", u_TU)
    _check_float("a_TU", a_TU)
    width = u_TU.shape[1]
    _check("a_TU", a_TU, tuple(u_TU.shape), u_TU)
    if a_TU.dtype != u_TU.dtype:
        raise ValueError(f"u_TU and a_TU differ in dtype: {u_TU.dtype}, {a_TU.dtype}")
    _check("weight_YD", weight_YD, (width * (3 if concat else 1), None), u_TU)
    _check("bias_D", bias_D, (weight_YD.shape[1],), u_TU)
    _check("norm_weight_U", norm_weight_U, (width,), u_TU)
    _check("norm_bias_U", norm_bias_U, (width,), u_TU)
    if (norm_weight_U is None) != (norm_bias_U is None):
        raise ValueError("norm_weight_U and norm_bias_U are given together or not at all")
    if groups < 1 or width % groups:
        raise ValueError(f"groups must divide U = {width}, the width of u_TU; it is {groups}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
    gate = Gate(groups=groups, eps=eps, silu=silu, concat=concat, dropout=dropout)
    return gated_projection_apply(u_TU, a_TU, weight_YD, bias_D, norm_weight_U, norm_bias_U, gate)


def _check_float(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] == 0 or x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must have 2 dimensions, the second positive, and a dtype of {', '.join(map(str, _DTYPES))}; "
            f"it is {x.dtype} {list(x.shape)}"
        )


def _check(name: str, x: Tensor | None, shape: tuple[int | None, ...], like: Tensor) -> None:
    if x is None:
        return
    if x.dim() != len(shape) or any(size not in (None, x.shape[d]) for d, size in enumerate(shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}], not {list(x.shape)}")
    if x.device != like.device or not x.is_floating_point():
        raise ValueError(f"{name} must be of a float dtype on {like.device}; it is {x.dtype} on {x.device}")

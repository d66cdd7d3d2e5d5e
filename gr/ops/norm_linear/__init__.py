"""The left half of a layer as one autograd node: its norm, projection (to u, v, q and k), optional SiLU.

T packed tokens, D model width, O output width. A call keeps x [T, D] for the backward pass, and z [T, O] under SiLU.
"""

from collections.abc import Sequence

from torch import Tensor

from gr.ops.checks import check_matrix, check_parameter
from gr.ops.norm_linear.fused import norm_linear_fused
from gr.ops.norm_linear.reference import Norm

__all__ = ["norm_linear"]


def norm_linear(
    x_TD: Tensor,
    weight_DO: Tensor,
    *,
    bias_O: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    norm_bias_D: Tensor | None = None,
    eps: float,
    silu: bool = False,
    splits: Sequence[int],
    norm: Norm = "layer",
    residual_TO: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """z = norm(x) weight + bias, or silu(z), with the residual added, in parts of splits[i] columns of one buffer.

    norm: over D; norm_weight_D and norm_bias_D are its affine map, where given. An RMS norm has no bias, and "none" has
    neither.
    Returns [T, splits[i]] in the dtype of x, or in the dtype of autocast. Every tensor gets a gradient. The backward
    pass computes the normed x again instead of keeping it.
    Raises ValueError if shapes, dtypes or devices do not fit, the splits do not sum to O, or the norm has no such
    weight or bias.
    Source: arXiv 2402.17152, Eq. 1; section 3.3 for the recomputation. RMS norm: Zhang and Sennrich 2019, Eq. 4.
    """
    check_matrix("x_TD", x_TD)
    check_parameter("weight_DO", weight_DO, (x_TD.shape[1], None), x_TD.device)
    check_parameter("bias_O", bias_O, (weight_DO.shape[1],), x_TD.device)
    check_parameter("norm_weight_D", norm_weight_D, (x_TD.shape[1],), x_TD.device)
    check_parameter("norm_bias_D", norm_bias_D, (x_TD.shape[1],), x_TD.device)
    # No len(x_TD): a length that Python has looked at is a constant of what is exported.
    check_parameter("residual_TO", residual_TO, (x_TD.shape[0], weight_DO.shape[1]), x_TD.device)
    if (norm != "layer" and norm_bias_D is not None) or (norm == "none" and norm_weight_D is not None):
        raise ValueError(f"norm={norm!r} has no bias, and a weight only if it is 'rms'")
    if sum(splits) != weight_DO.shape[1]:
        raise ValueError(f"splits {list(splits)} sum to {sum(splits)}; weight_DO has {weight_DO.shape[1]} columns")
    parameters = (weight_DO, bias_O, norm_weight_D, norm_bias_D)
    return norm_linear_fused(x_TD, parameters, eps, silu, splits, norm, residual_TO)

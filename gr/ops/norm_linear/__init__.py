"""The left half of an HSTU layer as one autograd node: layer norm, projection to u, v, q and k, optional SiLU.

T packed tokens, D model width, O output width. A call keeps x [T, D] for the backward pass, and z [T, O] under SiLU.
"""

from collections.abc import Sequence

from torch import Tensor

from gr.ops.checks import check_matrix, check_parameter
from gr.ops.norm_linear.fused import norm_linear_fused

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
) -> tuple[Tensor, ...]:
    """z = norm(x) weight + bias, or silu(z), cut into parts of splits[i] columns: u, v, q and k, in one buffer.

    norm is the layer norm over D; norm_weight_D and norm_bias_D are its affine map, where given.
    Returns [T, splits[i]] in the dtype of x, or in the dtype of autocast. Every tensor gets a gradient. The backward
    pass computes the normed x again instead of keeping it.
    Raises ValueError if shapes, dtypes or devices do not fit, or the splits do not sum to O.
    Source: arXiv 2402.17152, Eq. 1; section 3.3 for the recomputation.
    """
    check_matrix("x_TD", x_TD)
    check_parameter("weight_DO", weight_DO, (x_TD.shape[1], None), x_TD.device)
    check_parameter("bias_O", bias_O, (weight_DO.shape[1],), x_TD.device)
    check_parameter("norm_weight_D", norm_weight_D, (x_TD.shape[1],), x_TD.device)
    check_parameter("norm_bias_D", norm_bias_D, (x_TD.shape[1],), x_TD.device)
    if sum(splits) != weight_DO.shape[1]:
        raise ValueError(f"splits {list(splits)} sum to {sum(splits)}; weight_DO has {weight_DO.shape[1]} columns")
    return norm_linear_fused(x_TD, weight_DO, bias_O, norm_weight_D, norm_bias_D, eps, silu, splits)

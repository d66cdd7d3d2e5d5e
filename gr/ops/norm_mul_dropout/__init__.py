"""The right half of an HSTU layer as one autograd node: norm of the attention, times the gate, dropout, projection.

T packed tokens, D model width, U width of the gate u and of the attention a (H heads of V), Y width before the
projection. A call keeps u and a ([T, U] each) for the backward pass.
"""

from torch import Tensor

from gr.ops.checks import check_matrix, check_parameter
from gr.ops.norm_mul_dropout.fused import norm_mul_dropout_linear_fused
from gr.ops.norm_mul_dropout.reference import Gate

__all__ = ["norm_mul_dropout_linear"]


def norm_mul_dropout_linear(
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
    """dropout(u * norm(a)) weight + bias, or dropout([u, a, u * norm(a)]) weight + bias if concat.

    u_TU, a_TU: one dtype; rows may be strided. silu: silu(u) takes the place of u. weight_YD: Y = U, or 3 U if concat.
    groups: norm is a layer norm over each of so many equal parts of a, with one affine map over U where given.
    dropout: probability, already 0 in evaluation. The mask is a function of a seed drawn from torch's CPU generator, so
    it is not kept, and every device draws the same one.
    Returns [T, D] in the dtype of u, or in the dtype of autocast. Every tensor gets a gradient. The backward pass
    computes the input of the projection again instead of keeping it.
    Raises ValueError if shapes, dtypes or devices do not fit.
    Source: arXiv 2402.17152, Eq. 3; groups and concat from STULayer of meta-recsys/generative-recommenders.
    """
    check_matrix("u_TU", u_TU)
    check_matrix("a_TU", a_TU)
    width = u_TU.shape[1]
    check_parameter("a_TU", a_TU, tuple(u_TU.shape), u_TU.device)
    if a_TU.dtype != u_TU.dtype:
        raise ValueError(f"u_TU and a_TU differ in dtype: {u_TU.dtype}, {a_TU.dtype}")
    check_parameter("weight_YD", weight_YD, (width * (3 if concat else 1), None), u_TU.device)
    check_parameter("bias_D", bias_D, (weight_YD.shape[1],), u_TU.device)
    check_parameter("norm_weight_U", norm_weight_U, (width,), u_TU.device)
    check_parameter("norm_bias_U", norm_bias_U, (width,), u_TU.device)
    if (norm_weight_U is None) != (norm_bias_U is None):
        raise ValueError("norm_weight_U and norm_bias_U are given together or not at all")
    if groups < 1 or width % groups:
        raise ValueError(f"groups must divide U = {width}, the width of u_TU; it is {groups}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
    gate = Gate(groups=groups, eps=eps, silu=silu, concat=concat, dropout=dropout)
    return norm_mul_dropout_linear_fused(u_TU, a_TU, weight_YD, bias_D, norm_weight_U, norm_bias_U, gate)

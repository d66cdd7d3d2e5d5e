"""The definition of norm_linear. T packed tokens, D model width, O output width."""

from torch import Tensor
from torch.nn import functional as F


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
    """Arguments are those of norm_linear. Differentiable; any float dtype."""
    z_TO = F.layer_norm(x_TD, x_TD.shape[1:], norm_weight_D, norm_bias_D, eps) @ weight_DO
    z_TO = z_TO if bias_O is None else z_TO + bias_O
    return F.silu(z_TO) if silu else z_TO

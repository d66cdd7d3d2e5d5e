"""The definition of norm_linear. T packed tokens, D model width, O output width."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Norm = Literal["none", "layer", "rms"]


def norm_linear_reference(
    x_TD: Tensor,
    weight_DO: Tensor,
    bias_O: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    norm_bias_D: Tensor | None = None,
    *,
    eps: float,
    silu: bool = False,
    norm: Norm = "layer",
    residual_TO: Tensor | None = None,
) -> Tensor:
    """Arguments are those of norm_linear. Differentiable; any float dtype."""
    if norm == "layer":
        x_TD = F.layer_norm(x_TD, x_TD.shape[1:], norm_weight_D, norm_bias_D, eps)
    elif norm == "rms":
        x_TD = F.rms_norm(x_TD, x_TD.shape[1:], norm_weight_D, eps)
    z_TO = x_TD @ weight_DO
    z_TO = z_TO if bias_O is None else z_TO + bias_O
    y_TO = F.silu(z_TO) if silu else z_TO
    return y_TO if residual_TO is None else residual_TO + y_TO

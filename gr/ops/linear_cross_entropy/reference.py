"""The definition of linear cross-entropy. T tokens, K items, D width."""

from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    queries_TD: Tensor, items_KD: Tensor, target_T: Tensor, *, scale: float, bias_K: Tensor | None = None
) -> Tensor:
    """-log softmax(scale * queries items^T + bias)[t, target[t]] through the [T, K] logits. Differentiable."""
    logits_TK = scale * (queries_TD @ items_KD.T)
    if bias_K is not None:
        logits_TK = logits_TK + bias_K
    return F.cross_entropy(logits_TK, target_T, reduction="none")

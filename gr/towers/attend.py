"""The attention that a layer is given: of a packed batch, or of new tokens against a cache. T tokens, H heads."""

from typing import Protocol

from torch import Tensor


class Attend(Protocol):
    """Attention of q and k [T, H, Q] and v [T, H, V], as [T, H, V]; what is the same for all layers is bound.

    named: the layer's own biases, and `output` where it was computed before, as in hstu_attention.
    """

    def __call__(self, q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, /, **named: Tensor | None) -> Tensor: ...

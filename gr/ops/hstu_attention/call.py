"""The arguments of one call of hstu_attention after its checks, as every implementation takes them."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from gr.ops.hstu_attention.mask import AttentionMask
from gr.ops.hstu_attention.time_buckets import TimeBuckets


class Operands(NamedTuple):
    """The tensors that an autograd function takes one by one, as in hstu_attention; output gets no gradient."""

    q_THQ: Tensor
    k_THQ: Tensor
    v_THV: Tensor
    position_bias: Tensor | None = None
    time_bias: Tensor | None = None
    output: Tensor | None = None


@dataclass(frozen=True)
class AttentionCall:
    """The arguments without a gradient.

    offsets_B1: int64, contiguous. scale_T: 1 / divisor of each query, [T], or [1] for all of them; float32 or better,
    contiguous. time_buckets: given if and only if there is a time bias.
    """

    offsets_B1: Tensor
    max_length: int
    scale_T: Tensor
    alpha: float = 1.0
    mask: AttentionMask = field(default_factory=AttentionMask)
    time_buckets: TimeBuckets | None = None

    @property
    def sequences(self) -> int:
        return self.offsets_B1.numel() - 1

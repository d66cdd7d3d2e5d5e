"""The definition of norm_mul_dropout and its projection, their settings, and the dropout mask that every path draws.

T packed tokens, D model width, U width of the gate u and of the attention a, Y = U, or 3 U if concat.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# The step of Weyl's sequence, and the two multipliers of the 32-bit mixer lowbias32 of C. Wellons.
STEP, FIRST, SECOND = 0x9E3779B1, 0x21F0AAAD, 0x735A2D97


@dataclass(frozen=True)
class Gate:
    """Settings, named as the arguments of norm_mul_dropout_linear, and the seed of the dropout mask, below 2^31."""

    groups: int
    eps: float
    silu: bool
    concat: bool
    dropout: float
    seed: int = 0

    def seeded(self) -> "Gate":
        """These settings with a seed from torch's CPU generator, if there is dropout.

        A seed drawn on a GPU would have to be read back, which stops the device.
        """
        return replace(self, seed=int(torch.randint(1 << 31, ()))) if self.dropout else self

    @property
    def dropped(self) -> int:
        """The number of hash values, out of 2^32, that drop an element."""
        return round(self.dropout * 2**32)


def norm_mul_dropout_reference(
    u_TU: Tensor, a_TU: Tensor, norm_weight_U: Tensor | None, norm_bias_U: Tensor | None, gate: Gate
) -> Tensor:
    """The input of the projection, [T, Y]. Computed in float32 or better. Differentiable."""
    dtype = torch.promote_types(u_TU.dtype, torch.float32)
    u, a = u_TU.to(dtype), a_TU.to(dtype)
    u = F.silu(u) if gate.silu else u
    parts = a.unflatten(1, (gate.groups, -1))
    normed = F.layer_norm(parts, parts.shape[2:], eps=gate.eps).flatten(1)
    if norm_weight_U is not None and norm_bias_U is not None:
        normed = normed * norm_weight_U.to(dtype) + norm_bias_U.to(dtype)
    y = torch.cat([u, a, u * normed], dim=1) if gate.concat else u * normed
    if gate.dropped:
        y = y * (keep_mask(gate, y.shape[0], y.shape[1], y.device) * (1 / (1 - gate.dropout)))
    return y.to(u_TU.dtype)


def norm_mul_dropout_linear_reference(
    u_TU: Tensor,
    a_TU: Tensor,
    weight_YD: Tensor,
    bias_D: Tensor | None,
    norm_weight_U: Tensor | None,
    norm_bias_U: Tensor | None,
    gate: Gate,
) -> Tensor:
    """The projection of norm_mul_dropout_reference, [T, D]. Differentiable; any float dtype."""
    out_TD = norm_mul_dropout_reference(u_TU, a_TU, norm_weight_U, norm_bias_U, gate) @ weight_YD
    return out_TD if bias_D is None else out_TD + bias_D


def keep_mask(gate: Gate, rows: int, columns: int, device: torch.device) -> Tensor:
    """bool [rows, columns]: False where dropout zeroes the element.

    Element (t, c) is dropped if mix(mix(mix(t) ^ seed) + c step) < gate.dropped.
    """
    row, column = (torch.arange(size, dtype=torch.int32, device=device) for size in (rows, columns))
    key = _mix(_mix(row) ^ gate.seed)
    hashed = _mix(key[:, None] + column * _signed(STEP))
    return (hashed ^ _signed(1 << 31)) >= gate.dropped - (1 << 31)


def _signed(constant: int) -> int:
    """The int32 with the same 32 bits. torch multiplies int32 modulo 2^32, four times as fast as int64 on CPU."""
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which every input bit affects every output bit."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(FIRST)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(SECOND)
    return x ^ ((x >> 15) & 0x1FFFF)

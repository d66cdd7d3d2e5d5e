"""The element-wise part of the right half of a layer: its settings, its definition, and its dropout mask."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

STEP, FIRST, SECOND = 0x9E3779B1, 0x21F0AAAD, 0x735A2D97  # of Weyl's sequence, and of the mixer of C. Wellons


@dataclass(frozen=True)
class Gate:
    """As the arguments of gated_projection. seed: below 2^31, of the dropout mask."""

    groups: int
    eps: float
    silu: bool
    concat: bool
    dropout: float
    seed: int = 0

    def seeded(self) -> "Gate":
        """With a seed from torch's CPU generator, where a mask is needed: reading one from a device would stop it."""
        return replace(self, seed=int(torch.randint(1 << 31, ()))) if self.dropout else self

    @property
    def dropped(self) -> int:
        """How many of the 2^32 values of the hash drop an element."""
        return round(self.dropout * 2**32)


def gate_reference(
    u_TU: Tensor, a_TU: Tensor, norm_weight_U: Tensor | None, norm_bias_U: Tensor | None, gate: Gate
) -> Tensor:
    """The definition: what is projected, [T, U] or [T, 3 U]. Computed in float32 or better. Differentiable."""
    dtype = torch.promote_types(u_TU.dtype, torch.float32)
    u, a = u_TU.to(dtype), a_TU.to(dtype)
    u = F.silu(u) if gate.silu else u
    parts = a.unflatten(1, (gate.groups, -1))
    normed = F.layer_norm(parts, parts.shape[2:], eps=gate.eps).flatten(1)
    if norm_weight_U is not None and norm_bias_U is not None:
        normed = normed * norm_weight_U.to(dtype) + norm_bias_U.to(dtype)
    y = torch.cat([u, a, u * normed], dim=1) if gate.concat else u * normed
    if gate.dropped:
        y = y * (kept(gate, y.shape[0], y.shape[1], y.device) * (1 / (1 - gate.dropout)))
    return y.to(u_TU.dtype)


def kept(gate: Gate, rows: int, columns: int, device: torch.device) -> Tensor:
    """bool [rows, columns]: the mask. Element (t, c) is dropped if mix(mix(mix(t) ^ seed) + c step) is small."""
    row, column = (torch.arange(size, dtype=torch.int32, device=device) for size in (rows, columns))
    key = _mix(_mix(row) ^ gate.seed)
    hashed = _mix(key[:, None] + column * _signed(STEP))
    return (hashed ^ _signed(1 << 31)) >= gate.dropped - (1 << 31)


def _signed(constant: int) -> int:
    """The int32 with these 32 bits: torch multiplies int32 modulo 2^32, four times as fast as int64 on CPU."""
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits that spreads every bit."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(FIRST)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(SECOND)
    return x ^ ((x >> 15) & 0x1FFFF)

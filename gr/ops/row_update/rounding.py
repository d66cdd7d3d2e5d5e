"""Stochastic rounding to a half type: up or down by odds that make the mean exact, from a hash of where and when.

Nearest rounding loses every step that is smaller than half the distance of two neighbouring numbers: in fp16, 100 steps
of 1e-5 from 1.0 end at 1.0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gr.ops.splitmix64 import shift_right, splitmix64

# The bits of a float32's mantissa that a type cuts off, and the exponent (biased, of float32) of its least normal.
CUT_BITS = {torch.float16: (13, 113), torch.bfloat16: (16, 1)}
_MANTISSA_BITS = 23


@dataclass(frozen=True)
class StochasticRounding:
    """The draws of one shard of a table at one step, the same at any world size and under any plan.

    key: of the table and the seed. step: of the run. row, column: the first of the shard. columns: of the whole table.
    """

    key: int
    step: int
    row: int
    column: int
    columns: int

    def __call__(self, x_RD: Tensor, rows_R: Tensor, dtype: torch.dtype) -> Tensor:
        """x_RD, float32, as float16 or bfloat16. rows_R: the rows of the shard that x_RD are."""
        cut, least = CUT_BITS[dtype]
        bits = x_RD.view(torch.int32).long() & 0xFFFFFFFF
        exponent = shift_right(bits, _MANTISSA_BITS) & 0xFF
        # Below the least normal number the distance of two neighbours no longer shrinks: more bits are cut off.
        cut_RD = cut + (least - exponent).clamp(min=0)
        noise = shift_right(self._hash(rows_R, x_RD.shape[1]), 32)
        unit = torch.ones_like(bits)
        fine = cut_RD <= _MANTISSA_BITS
        safe = cut_RD.clamp(max=_MANTISSA_BITS)
        rounded = bits + (noise & ((unit << safe) - 1))
        rounded = rounded & ~((unit << safe) - 1)
        rounded = (rounded - ((rounded >> 31) << 32)).int().view(torch.float32)
        # Nearer to zero than the least number of the type: it, by the odds of the distance, or zero.
        least_number = 2.0 ** (least - 127 + cut - _MANTISSA_BITS)
        up = noise.double() * 2.0**-32 < x_RD.double().abs() / least_number
        tiny = torch.where(up, least_number, 0.0).float().copysign(x_RD)
        finite = torch.where(fine, rounded, tiny).to(dtype)
        return torch.where(exponent == 0xFF, x_RD.to(dtype), finite)

    @property
    def start(self) -> int:
        """The key of this step, as a signed int64."""
        return int(splitmix64(torch.tensor(self.key) + self.step))

    def _hash(self, rows_R: Tensor, width: int) -> Tensor:
        column_D = torch.arange(width, device=rows_R.device) + self.column
        return splitmix64((rows_R[:, None] + self.row) * self.columns + column_D + self.start)

"""Rotary position embedding on packed sequences (Su et al. 2021, arXiv 2104.09864, section 3.4.2).

T packed tokens, B sequences, H heads, Q width per head. The first half of a head's columns are the real parts, the
second half the imaginary ones, as Hugging Face has it. Meta's checkpoints interleave the two: a permutation of weights
(gr.models.convert.hf_llama), not a second form of the operator.
"""

from typing import Any

import torch
from torch import Tensor

from gr.ops.backend import backend_for


def places(offsets_B1: Tensor, tokens: int, num_targets_B: Tensor | None = None) -> Tensor:
    """int64 [T]: the place of each token in its sequence, from 0; T = tokens.

    offsets_B1: int64 [B + 1]. num_targets_B: the last tokens of each sequence that are candidates, which all stand at
    the place after the history.
    """
    lengths_B = offsets_B1.diff()
    starts_T = offsets_B1[:-1].repeat_interleave(lengths_B, output_size=tokens)
    place_T = torch.arange(tokens, device=offsets_B1.device) - starts_T
    if num_targets_B is None:
        return place_T
    return torch.minimum(place_T, (lengths_B - num_targets_B).repeat_interleave(lengths_B, output_size=tokens))


def rope_tables(place_T: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of each token's angles, [T, 1, Q / 2] in `dtype`, computed in float32 or better; Q = width, even.

    place_T: int64 [T]. theta: the base of the frequencies, theta^(-2i/Q). Computed at each step and never a buffer:
    what a model built on meta would have to fill.
    """
    exact = torch.promote_types(dtype, torch.float32)
    frequency = 1.0 / theta ** (torch.arange(0, width, 2, device=place_T.device).to(exact) / width)
    # Asked first: a length that Python has looked at is a constant of what is exported.
    if not torch.compiler.is_compiling() and place_T.device.type == "cpu" and len(place_T):
        places = int(place_T.max()) + 1
        if places < len(place_T):  # not of single tokens that are decoded, far from the start
            # Tokens share few places: a row for each place, then one for each token.
            cos_N1P, sin_N1P = _cos_and_sin(torch.arange(places), frequency, dtype)
            return cos_N1P[place_T], sin_N1P[place_T]
    return _cos_and_sin(place_T, frequency, dtype)


def _cos_and_sin(place_T: Tensor, frequency_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle_T1P = (place_T[:, None].to(frequency_P.dtype) * frequency_P)[:, None]
    return angle_T1P.cos().to(dtype), angle_T1P.sin().to(dtype)


def rotate(x_THQ: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """Each pair of columns (c, c + Q/2) of a head turned by its token's angle; P = Q/2. Gradient: x."""
    return _Rotate.apply(x_THQ, cos_T1P, sin_T1P)


def _turned(x_THQ: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, sign: int) -> Tensor:
    native = x_THQ.device.type == "cpu" and x_THQ.dtype == cos_T1P.dtype == torch.float32
    if native and backend_for(x_THQ.device) == "native":
        if x_THQ.stride()[1:] != (x_THQ.shape[2], 1):
            x_THQ = x_THQ.contiguous()
        return torch.ops.gr.rotate(x_THQ, cos_T1P, sin_T1P, sign < 0)
    real, imaginary = x_THQ.chunk(2, dim=-1)
    turned = x_THQ.new_empty(x_THQ.shape, dtype=torch.promote_types(x_THQ.dtype, cos_T1P.dtype))
    turned_real, turned_imaginary = turned.chunk(2, dim=-1)
    torch.mul(real, cos_T1P, out=turned_real).addcmul_(imaginary, sin_T1P, value=-sign)
    torch.mul(imaginary, cos_T1P, out=turned_imaginary).addcmul_(real, sin_T1P, value=sign)
    return turned


class _Rotate(torch.autograd.Function):
    """Keeps the tables alone: the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x_THQ: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1P, sin_T1P)
        ctx.dtype = x_THQ.dtype
        return _turned(x_THQ, cos_T1P, sin_T1P, 1)

    @staticmethod
    def backward(ctx: Any, grad_THQ: Tensor) -> tuple[Tensor, None, None]:
        cos_T1P, sin_T1P = ctx.saved_tensors
        return _turned(grad_THQ, cos_T1P, sin_T1P, -1).to(ctx.dtype), None, None

"""Rotary position embedding on packed sequences (Su et al. 2021, arXiv 2104.09864, section 3.4.2).

T packed tokens, B sequences, H heads, Q width per head. The first half of a head's columns are the real parts, the
second half the imaginary ones, as Hugging Face has it. Meta's checkpoints interleave the two: a permutation of weights
(gr.models.convert.hf_llama), not a second form of the operator.
"""

import torch
from torch import Tensor


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
    """cos and sin of each token's angles, [T, 1, Q] in `dtype`, computed in float32 or better; Q = width, even.

    place_T: int64 [T]. theta: the base of the frequencies, theta^(-2i/Q). Computed at each step and never a buffer:
    what a model built on meta would have to fill.
    """
    exact = torch.promote_types(dtype, torch.float32)
    frequency = 1.0 / theta ** (torch.arange(0, width, 2, device=place_T.device).to(exact) / width)
    angle = (place_T[:, None].to(exact) * frequency).repeat(1, 2)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_THQ: Tensor, cos_T1Q: Tensor, sin_T1Q: Tensor) -> Tensor:
    """Each pair of columns (c, c + Q/2) of a head turned by its token's angle, in the dtype of x."""
    real, imaginary = x_THQ.chunk(2, dim=-1)
    return x_THQ * cos_T1Q + torch.cat([-imaginary, real], dim=-1) * sin_T1Q

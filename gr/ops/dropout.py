"""Dropout with a mask that is cheap on CPU, where torch draws one Bernoulli number an element, a tenth of a step."""

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 1 << 16


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zeroes each element with `probability` and scales the others so that the mean stays; the identity in evaluation.

    On CPU the probability is rounded to a multiple of 1/65536, and four elements share one 64-bit draw of torch's
    generator.
    """
    if x.device.type != "cpu":
        return F.dropout(x, probability, training)
    dropped = min(round(probability * LEVELS), LEVELS - 1)
    if not training or dropped == 0:
        return x
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    keep = draws[: x.numel()].view(x.shape) >= dropped - LEVELS // 2
    return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))

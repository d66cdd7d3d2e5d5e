"""Buckets of a time before now, as the input of ranking encodes it. T events."""

from typing import Literal

from torch import Tensor

SECONDS = 60.0
LOG_STEP = 0.301


def time_bucket(seconds_T: Tensor, scale: Literal["sqrt", "log"], buckets: int) -> Tensor:
    """int64 in [0, buckets): of minutes, their square root or their logarithm over 0.301, rounded down."""
    minutes_T = seconds_T.clamp(min=0).double() / SECONDS
    scaled_T = minutes_T.sqrt() if scale == "sqrt" else minutes_T.clamp(min=1).log() / LOG_STEP
    return scaled_T.long().clamp(max=buckets - 1)

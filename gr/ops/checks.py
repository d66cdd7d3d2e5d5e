"""Checks of operator arguments. Each raises ValueError and names the argument."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_matrix(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is [any, positive] in one of FLOAT_DTYPES."""
    if x.dim() != 2 or x.shape[1] == 0 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} must have 2 dimensions, the second positive, and a dtype of {', '.join(map(str, FLOAT_DTYPES))}; "
            f"it is {x.dtype} {list(x.shape)}"
        )


def check_parameter(name: str, x: Tensor | None, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Raise ValueError unless x is None, or a float tensor of `shape` on `device`. A size of None matches any size."""
    if x is None:
        return
    if x.dim() != len(shape) or any(size not in (None, x.shape[d]) for d, size in enumerate(shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{expected}], not {list(x.shape)}")
    if x.device != device or not x.is_floating_point():
        raise ValueError(f"{name} must be of a float dtype on {device}; it is {x.dtype} on {x.device}")

"""The dtype of matrix products under autocast, for operators that are custom autograd functions."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast prescribes for products on the device of x, or the dtype of x where autocast is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

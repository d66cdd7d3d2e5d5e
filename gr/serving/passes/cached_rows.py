"""Keys and values as a cache keeps them: float32, bfloat16, or int8 with an fp16 scale for each token and head.

T tokens, G heads of keys and values, Q and V their widths. W = Q + V, in int8 with two more for the bytes of the scale.
"""

import torch
from torch import Tensor

SCALE = 2  # bytes of a row
_SMALLEST = 2.0**-14  # the first normal number of fp16


def stored(k_TGQ: Tensor, v_TGV: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, G, W] in `dtype`. The bits of a row depend on its own numbers alone."""
    kv_TGW = torch.cat([k_TGQ, v_TGV], dim=-1)
    if dtype != torch.int8:
        return kv_TGW.to(dtype)
    scale_TG1 = (kv_TGW.float().abs().amax(-1, keepdim=True) / 127).clamp(min=_SMALLEST).half()
    values_TGW = (kv_TGW.float() / scale_TG1.float()).round().clamp(-127, 127)
    bits_TG1 = scale_TG1.view(torch.int16)
    return torch.cat([values_TGW.to(torch.int16), bits_TG1 & 0xFF, bits_TG1 >> 8], dim=-1).to(torch.int8)


def widened(kv_TGW: Tensor) -> Tensor:
    """Keys and values side by side, [T, G, Q + V]: float32 where they were stored as int8."""
    if kv_TGW.dtype != torch.int8:
        return kv_TGW
    values_TGW, low_TG1, high_TG1 = kv_TGW.to(torch.int16).split([kv_TGW.shape[-1] - SCALE, 1, 1], dim=-1)
    scale_TG1 = ((low_TG1 & 0xFF) | (high_TG1 << 8)).view(torch.float16)
    return values_TGW.float() * scale_TG1.float()

"""Keys and values as a cache keeps them: float32, bfloat16, or int8 with an fp16 scale for each token, head and part.

T tokens, G heads of keys and values, Q and V their widths. W = Q + V, in int8 and four for the bytes of two scales.
"""

import torch
from torch import Tensor

SCALES = 4  # bytes of a row: the scale of its keys, and that of its values
_SMALLEST = 2.0**-14  # the first normal number of fp16


def stored(k_TGQ: Tensor, v_TGV: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, G, W] in `dtype`. The bits of a row depend on its own numbers alone."""
    if dtype != torch.int8:
        return torch.cat([k_TGQ, v_TGV], dim=-1).to(dtype)
    values, scales = zip(*map(_quantised, (k_TGQ, v_TGV)), strict=True)
    return torch.cat([*values, *scales], dim=-1)


def widened(kv_TGW: Tensor, key_width: int) -> tuple[Tensor, Tensor]:
    """Keys [T, G, Q] and values [T, G, V], float32 where they were stored as int8. key_width: Q."""
    if kv_TGW.dtype != torch.int8:
        return kv_TGW[..., :key_width], kv_TGW[..., key_width:]
    value_width = kv_TGW.shape[-1] - key_width - SCALES
    k, v, *scales = kv_TGW.split([key_width, value_width, SCALES // 2, SCALES // 2], dim=-1)
    k_TGQ, v_TGV = (part.float() * _scale(bytes_TG2) for part, bytes_TG2 in zip((k, v), scales, strict=True))
    return k_TGQ, v_TGV


def _quantised(x_TGQ: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [T, G, Q], and the bytes of the scales, int8 [T, G, 2]."""
    x_TGQ = x_TGQ.float()
    scale_TG1 = (x_TGQ.abs().amax(-1, keepdim=True) / 127).clamp(min=_SMALLEST).half()
    bits_TG1 = scale_TG1.view(torch.int16)
    values_TGQ = (x_TGQ / scale_TG1.float()).round().clamp(-127, 127)
    return values_TGQ.to(torch.int8), torch.cat([bits_TG1 & 0xFF, bits_TG1 >> 8], dim=-1).to(torch.int8)


def _scale(bytes_TG2: Tensor) -> Tensor:
    """float32 [T, G, 1]."""
    low_TG1, high_TG1 = bytes_TG2.to(torch.int16).split(1, dim=-1)
    return ((low_TG1 & 0xFF) | (high_TG1 << 8)).view(torch.float16).float()

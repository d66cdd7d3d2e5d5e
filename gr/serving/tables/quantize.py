"""Rows of tables in fewer bits: fp16, or whole numbers of 8, 4 or 2 bits with an fp16 scale and bias a row.

The layout is that of fbgemm's n-bit lookup (IntNBitTableBatchedEmbeddingBagsCodegen). E rows, D columns.
"""

from typing import Final, get_args

import fbgemm_gpu  # noqa: F401  registers the operators
import torch
from torch import Tensor

from gr.config.export import RowKind
from gr.errors import ServingError

ROW_KINDS: Final[tuple[RowKind, ...]] = get_args(RowKind)  # from the most bytes to the fewest
_BITS: Final = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int2": 2}
_FLOATS: Final = {"fp32": torch.float32, "fp16": torch.float16}
_SCALE_AND_BIAS = 4  # bytes of a row
_LARGEST = torch.finfo(torch.float16).max


def has_kind(dim: int, kind: RowKind) -> bool:
    """Whether rows of `dim` columns can be of a kind: fbgemm packs whole numbers where a row fills whole fp16 words."""
    return kind in _FLOATS or dim * _BITS[kind] % 16 == 0


def bytes_of(rows: int, dim: int, kind: RowKind) -> int:
    """Bytes of a table's rows, scales and biases included; the padding of a buffer of tables is not."""
    return rows * (dim * _BITS[kind] // 8 + (0 if kind in _FLOATS else _SCALE_AND_BIAS))


def clipped(weight: Tensor, kind: RowKind) -> int:
    """The number of values that pack() clips, since they lie outside the range of fp16 (65,504 either side of 0)."""
    return 0 if kind == "fp32" else int((weight.abs() > _LARGEST).sum())


def pack(weight: Tensor, kind: RowKind) -> tuple[Tensor, Tensor | None]:
    """The rows as bytes, uint8 [E, bytes], and the fp16 scale and bias of each as bytes, uint8 [E, 4], or None.

    weight: float [E, D], finite. Values outside the range of fp16 are clipped to it (see `clipped`), but for fp32.
    Raises ServingError for values that are not finite, and for a width that the kind cannot have.
    """
    dim = weight.shape[1]
    if not has_kind(dim, kind):
        raise ServingError(
            f"rows of {dim} columns cannot be {kind}: their number must be a multiple of {16 // _BITS[kind]}; use fp16"
        )
    if wrong := int((~weight.isfinite()).sum()):
        raise ServingError(f"{wrong:,} of {weight.numel():,} values of a table are not finite: the model has diverged")
    values = weight.float() if kind == "fp32" else weight.float().clamp(-_LARGEST, _LARGEST)
    if kind in _FLOATS:
        return values.to(_FLOATS[kind]).contiguous().view(torch.uint8), None
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(values.contiguous(), _BITS[kind])
    return fused[:, :-_SCALE_AND_BIAS].contiguous(), fused[:, -_SCALE_AND_BIAS:].contiguous()


def unpack(rows: Tensor, scale_bias: Tensor | None, kind: RowKind) -> Tensor:
    """The values of packed rows, float32 [E, D], as a lookup gives them."""
    if scale_bias is None:
        return rows.contiguous().view(_FLOATS[kind]).float()
    fused = torch.cat([rows, scale_bias], dim=1)
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(fused, _BITS[kind])


def round_trip(weight: Tensor, kind: RowKind) -> Tensor:
    """The values that rows of a kind keep of a weight, float32 [E, D]. Raises ServingError, as pack does."""
    return unpack(*pack(weight, kind), kind)

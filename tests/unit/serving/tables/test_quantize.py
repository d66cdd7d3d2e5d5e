"""Packed rows: what they keep of a weight, their bytes, and what they refuse. E rows, D columns."""

import pytest
import torch

from gr.errors import ServingError
from gr.serving.tables.quantize import ROW_KINDS, RowKind, bytes_of, clipped, has_kind, pack, round_trip, unpack

STEPS = {"int8": 255, "int4": 15, "int2": 3}


def reference(weight_ED: torch.Tensor, kind: RowKind) -> torch.Tensor:
    """The definition: equal steps between a row's least and greatest value, both ends and the step in fp16."""
    if kind == "fp32":
        return weight_ED
    if kind == "fp16":
        return weight_ED.half().float()
    low_E1 = weight_ED.amin(1, keepdim=True).half().float()
    step_E1 = ((weight_ED.amax(1, keepdim=True) - low_E1) / STEPS[kind]).half().float()
    return ((weight_ED - low_E1) / step_E1).round().clamp(0, STEPS[kind]) * step_E1 + low_E1


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_rows_keep_what_their_definition_says(kind: RowKind) -> None:
    weight_ED = torch.randn(37, 24, generator=torch.Generator().manual_seed(0))
    rows, scale_bias = pack(weight_ED, kind)
    assert rows.dtype == torch.uint8 and (scale_bias is None) == (kind in ("fp32", "fp16"))
    packed = rows.numel() + (0 if scale_bias is None else scale_bias.numel())
    assert packed == bytes_of(37, 24, kind)
    # A value half-way between two steps may be rounded to either.
    step = 0.0 if kind not in STEPS else float((weight_ED.amax(1) - weight_ED.amin(1)).max()) / STEPS[kind]
    difference_ED = (unpack(rows, scale_bias, kind) - reference(weight_ED, kind)).abs()
    assert difference_ED.max() <= 1.01 * step and (difference_ED > 1e-6).float().mean() < 0.01
    assert torch.equal(round_trip(weight_ED, kind), unpack(rows, scale_bias, kind))


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_rows_of_equal_values_are_exact(kind: RowKind) -> None:
    weight_ED = torch.tensor([0.0, 3.0, -0.5])[:, None].repeat(1, 8)
    assert torch.equal(round_trip(weight_ED, kind), weight_ED)
    assert round_trip(weight_ED[:0], kind).shape == (0, 8)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_values_beyond_fp16_are_clipped_and_counted(kind: RowKind) -> None:
    weight_ED = torch.full((2, 8), 1.0)
    weight_ED[0, 0], weight_ED[0, 1] = 1e6, -7e4
    kept_ED = round_trip(weight_ED, kind)
    assert kept_ED.isfinite().all()
    assert clipped(weight_ED, kind) == (0 if kind == "fp32" else 2)
    if kind != "fp32":
        assert 60_000 < kept_ED[0, 0] < 66_000 and -66_000 < kept_ED[0, 1] < -60_000  # a step is rounded, too


def test_what_cannot_be_packed_is_one_line() -> None:
    with pytest.raises(ServingError, match="1 of 8 values of a table are not finite"):
        pack(torch.tensor([[1.0] * 7 + [torch.nan]]), "fp16")
    assert [kind for kind in ROW_KINDS if has_kind(6, kind)] == ["fp32", "fp16", "int8"]
    assert [kind for kind in ROW_KINDS if has_kind(33, kind)] == ["fp32", "fp16"]
    with pytest.raises(ServingError, match="rows of 6 columns cannot be int4: their number must be a multiple of 4"):
        pack(torch.zeros(2, 6), "int4")

"""Keys and values as a cache keeps them: how far they are from what was computed, row by row."""

import pytest
import torch

from gr.serving.passes.cached_rows import SCALE, stored, widened


@pytest.mark.parametrize("size", [1e-6, 0.03, 1.0, 300.0])
def test_int8_is_within_half_a_step(size: float) -> None:
    random = torch.Generator().manual_seed(0)
    k_TGQ, v_TGV = (size * torch.randn(19, 3, width, generator=random) for width in (5, 8))
    k_TGQ[4] = v_TGV[4] = 0
    kv_TGW = stored(k_TGQ, v_TGV, torch.int8)
    assert kv_TGW.dtype == torch.int8 and kv_TGW.shape == (19, 3, 13 + SCALE)
    expected = torch.cat([k_TGQ, v_TGV], dim=-1)
    step_TG1 = (expected.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-14)
    assert ((widened(kv_TGW) - expected).abs() <= 0.6 * step_TG1).all()
    assert torch.equal(stored(k_TGQ[7:9], v_TGV[7:9], torch.int8), kv_TGW[7:9]), "a row depends on its own numbers"


def test_floats_are_cast() -> None:
    k_TGQ, v_TGV = torch.randn(4, 2, 3), torch.randn(4, 2, 5)
    for dtype in (torch.float32, torch.bfloat16):
        kv_TGW = stored(k_TGQ, v_TGV, dtype)
        assert torch.equal(kv_TGW, torch.cat([k_TGQ, v_TGV], -1).to(dtype)) and widened(kv_TGW) is kv_TGW

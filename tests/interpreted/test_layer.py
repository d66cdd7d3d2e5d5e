"""The Triton kernels of a layer's gate against the definition in float64, with the same dropout mask."""

from dataclasses import replace

import pytest
import torch

from gr.ops.backend import force_backend
from gr.ops.layer import gated_projection
from gr.ops.layer.gate import kept
from tests.ops.test_layer import GATE, assert_gate, gate_case, run_gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("concat", [False, True], ids=["", "concat"])
@pytest.mark.parametrize("groups", [1, 3])
def test_gate_matches_definition(groups: int, concat: bool, dtype: torch.dtype) -> None:
    gate = replace(GATE, groups=groups, silu=concat, concat=concat, dropout=0.3, seed=5)
    assert_gate(gate, 9, 48, groups == 1, dtype, "triton")
    assert_gate(replace(gate, dropout=0.0), 5, 27, groups == 3, dtype, "triton")


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    assert_gate(replace(GATE, concat=True, dropout=0.5), tokens, 50, True, torch.float32, "triton")


def test_same_mask_and_same_bits() -> None:
    gate = replace(GATE, concat=True, dropout=0.25)
    u, a = torch.ones(20, 40), torch.rand(20, 40)
    with force_backend("triton"):
        torch.manual_seed(3)
        out = gated_projection(u, a, torch.eye(120), eps=1e-6, concat=True, dropout=0.25)
    torch.manual_seed(3)
    assert torch.equal(out[:, :40] != 0, kept(gate.seeded(), 20, 120, u.device)[:, :40])
    inputs, grad = gate_case(gate, 20, 32, True, torch.float32)
    first, again = (run_gate(gate, inputs, grad, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_rows_too_wide_for_a_gpu() -> None:
    x = torch.zeros(1, 20000)
    with force_backend("triton"), pytest.raises(ValueError, match="u_TU has 20000 columns"):
        gated_projection(x, x, torch.zeros(20000, 1), eps=1e-6)

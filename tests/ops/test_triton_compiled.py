"""Every Triton kernel in every shape that is launched, compiled for three generations of GPUs, and read: no GPU needed.

A kernel that spills registers, misses the tensor cores, or loads without a pipeline is correct and slow; these tests
reject it.
"""

import importlib.util
import os
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]
if importlib.util.find_spec("triton") is not None:
    from gr.ops.hstu_attention import triton as attention
    from gr.ops.norm_mul_dropout import triton as gate_kernels
    from gr.ops.norm_mul_dropout.reference import Gate
    from gr.ops.sampled_logits import triton as logits
    from tests.support.compiled import Compiled, compile_for

    TILES = {arch: attention.tiles_on(arch) for arch in (80, 90, 100)}
else:
    TILES = {}

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
TENSOR_CORES = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}

ATTENTION_TYPES = {
    **{name: "*i64" for name in ("offsets", "targets")},
    **{name: "*i32" for name in ("query_times", "key_times", "edges")},
    **{name: "*fp32" for name in ("scale_ptr", "time", "position", "dcandidates_ptr", "dposition_ptr", "dtime_ptr")},
    **{name: "i32" for name in ("heads", "last", "sequences", "ahead")},
    **{f"{name}_{of}": "i32" for name in ("q", "k", "v", "g", "out", "dq", "dk", "dv") for of in ("row", "head")},
    "half_alpha": "fp32",
}


def compile_attention(kernel: str, size: int, width: int, biased: bool, arch: int) -> "Compiled":
    """A kernel as the towers call it: candidates without a bias (STU), both biases without candidates (HSTU)."""
    tiles = TILES[arch][kernel, size, width, biased]
    outer_is_keys = kernel == "key_gradient"
    constants: dict[str, Any] = {
        **{"Q": width, "V": width, "QP": width, "VP": width, "ROW_SCALE": False},
        **{"TARGETS": not biased, "TIME": biased, "POSITION": biased, "WINDOW": 0, "CONTEXT": 0, "FULL": 0},
        **{"FAST": size == 2, "M": tiles.inner if outer_is_keys else tiles.outer},
        **{"N": tiles.outer if outer_is_keys else tiles.inner, "C": tiles.inner, "dcandidates_ptr": None},
    }
    absent = ("targets",) if biased else ("query_times", "key_times", "edges", "time", "position")
    constants |= dict.fromkeys(absent)
    element = "*bf16" if size == 2 else "*fp32"
    values = {f"{name}_ptr": element for name in ("q", "k", "v", "g", "out", "dq", "dk", "dv")}
    return compile_for(
        getattr(attention, f"{kernel}_kernel"),
        arch,
        ATTENTION_TYPES | values,
        constants,
        warps=tiles.warps,
        stages=tiles.stages,
        unaligned=frozenset({"position"}),
    )


# On the neighbours of sm_90, half precision alone: float32 is for checks on a GPU.
LAUNCHED = [(*key, arch) for arch, keys in TILES.items() for key in keys if arch == 90 or key[1] == 2]


@pytest.mark.parametrize(("kernel", "size", "width", "biased", "arch"), LAUNCHED, ids=str)
def test_attention(kernel: str, size: int, width: int, biased: bool, arch: int) -> None:
    tiles = TILES[arch][kernel, size, width, biased]
    done = compile_attention(kernel, size, width, biased, arch)
    assert done.spills == 0, f"{done.spills} spills, {done.registers} registers"
    assert done.shared <= SHARED[arch]
    assert any(done.counts[name] for name in TENSOR_CORES[arch])
    assert done.counts["F2F"] == 0  # a conversion by element, as slow as the activation
    if tiles.stages > 1:
        assert done.pipelined_loads > 0
    if size == 2 and arch == 90 and width <= 128:
        # Half of Hopper's tensor cores is out of reach of the older instruction.
        assert done.counts["HGMMA"] > 0 and done.counts["HMMA"] == 0
    if size == 2 and arch == 90 and not biased:
        # One special-function instruction an element and loop, and one reciprocal of a division.
        elements = tiles.outer * tiles.inner // (32 * tiles.warps)
        assert done.counts["MUFU"] <= 2 * elements + 2


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("width", [50, 64, 256])
@pytest.mark.parametrize("kernel", ["logits_kernel", "query_gradient_kernel", "item_gradient_kernel"])
def test_sampled_logits(kernel: str, width: int, arch: int) -> None:
    floats = ("queries", "items", "logits", "grad", "dqueries", "ditems")
    types = {name: "*bf16" for name in floats} | {name: "*i64" for name in ("index", "order", "bounds")}
    types |= {name: "i32" for name in ("samples", "query_row", "item_row")}
    shape = logits.shape_of(width)
    done = compile_for(getattr(logits, kernel), arch, types, shape, warps=logits.WARPS)
    assert done.spills == 0 and done.shared <= SHARED[arch]


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(
    ("width", "groups", "concat"),
    [(50, 1, False), (512, 1, True), (1024, 8, True), (2048, 8, True), (4096, 1, True), (4096, 8, True)],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_norm_mul_dropout(kernel: str, width: int, groups: int, concat: bool, arch: int) -> None:
    types = {name: "*bf16" for name in ("u_ptr", "a_ptr", "y_ptr", "dy_ptr", "du_ptr", "da_ptr")}
    types |= {name: "*fp32" for name in ("weight", "bias", "sums")} | {"eps": "fp32", "keep_scale": "fp32"}
    types |= {"rows": "i32", "u_row": "i32", "a_row": "i32", "seed": "i32", "dropped": "i64"}
    gate = Gate(groups=groups, eps=1e-6, silu=concat, concat=concat, dropout=0.2)
    shape = gate_kernels.shape_of(width, concat, gate)
    constants: dict[str, Any] = shape | ({} if concat else {"weight": None, "bias": None})
    done = compile_for(getattr(gate_kernels, kernel), arch, types, constants, warps=gate_kernels.warps_of(shape))
    assert done.spills == 0 and done.shared <= SHARED[arch]


def test_the_widest_heads_have_tiles() -> None:
    for kernel in ("forward", "query_gradient", "key_gradient"):
        for biased in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                assert attention.tiles_of(kernel, dtype, attention.MAX_WIDTH[dtype.itemsize], biased, 90)

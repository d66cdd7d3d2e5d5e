"""Triton kernels on CPU tensors, in a process that tests/ops/test_triton.py starts with TRITON_INTERPRET=1.

Test modules import bodies of tests/ops, which take the backend from the fixture of this file.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gr.ops.backend import Backend


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 set before Python starts")
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def backend() -> Backend:
    return "triton"


@pytest.fixture(autouse=True)
def _bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter multiply bfloat16 values in float32, and round float32 to the nearest, ties to even.

    The interpreter keeps bfloat16 as its bits. By itself it multiplies those bits (triton issue 11584) and rounds
    towards zero.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *options)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        if (x.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(torch.tensor(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, widened(x), to)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)

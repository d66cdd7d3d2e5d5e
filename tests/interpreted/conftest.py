"""Triton kernels on CPU tensors. Only in a process started with TRITON_INTERPRET=1: tests/ops/test_triton.py starts it.

bfloat16 is left to a GPU: the interpreter multiplies its raw bits (triton issue 11584).
"""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 set before Python starts")
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

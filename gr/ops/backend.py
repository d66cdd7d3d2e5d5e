"""The one rule that chooses which implementation of an operator runs.

native   C++ compiled on this machine (gr.ops.cpp_extension); the choice for CPU tensors
triton   Triton kernels; the only choice for CUDA tensors, since slow steps cost more there than installing Triton
torch    plain PyTorch on any device; the fallback for CPU tensors where the C++ cannot be built, logged once

Operators call backend_for() at each call; no module holds a setting.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

from gr.errors import InstallError
from gr.logging import get_logger, log_once
from gr.ops import cpp_extension, triton
from gr.ops.autocast import product_dtype

Backend = Literal["native", "torch", "triton"]

# The weights are read for each block of rows: 2 MiB stay in a core's cache, or near. Larger products are torch's.
_MOST_WEIGHTS = 1 << 19

_logger = get_logger(__name__)
_forced: ContextVar[Backend | None] = ContextVar("gr.ops forced backend", default=None)


def backend_for(device: torch.device) -> Backend:
    """The implementation for tensors on `device` at this moment. The first call may build the C++ operators (20 s).

    Raises InstallError for CUDA tensors where Triton does not run.
    """
    return _forced.get() or _default_backend(device.type)


def fuses_layers(x: Tensor, weights: int) -> bool:
    """Whether C++ that joins a layer's norm, products and activation computes with x, and with so many weights.

    It is of float32 on CPU, outside autocast. Exported models keep to torch, whose compiler joins the steps itself.
    """
    single = x.device.type == "cpu" and x.dtype == product_dtype(x) == torch.float32 and weights <= _MOST_WEIGHTS
    return single and not torch.compiler.is_compiling() and backend_for(x.device) == "native"


@contextlib.contextmanager
def force_backend(name: Literal[Backend, "auto"]) -> Iterator[None]:
    """Use one implementation inside a `with` block; "auto" changes nothing.

    Raises ValueError for any other name, and InstallError if this machine cannot run the implementation.
    """
    if name == "auto":
        yield
        return
    if name not in get_args(Backend):
        raise ValueError(f"backend must be 'native', 'torch' or 'triton', not {name!r}")
    if name == "native":
        cpp_extension.load()
    elif name == "triton":
        triton.load()
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _default_backend(device_type: str) -> Backend:
    if device_type == "cuda":
        triton.load()
        return "triton"
    if device_type == "cpu":
        try:
            cpp_extension.load()
            return "native"
        except InstallError as error:
            log_once(_logger, f"CPU operators fall back to plain PyTorch, which is several times slower: {error}")
    return "torch"

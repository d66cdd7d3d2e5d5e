"""The one rule that says which implementation of an operator runs.

"native": C++ built on this machine (gr.ops.native), for CPU tensors. "triton": for CUDA tensors. "torch": plain PyTorch
on any device, and for CPU tensors where the C++ cannot be had, which is said. On a GPU nothing but Triton is taken
unless forced: CUDA builds of torch bring it, and what it may lack costs less than slow steps. "fbgemm": HSTU attention
by FBGEMM's CUTLASS kernels, and everything else as under "triton"; only when forced. Operators ask backend_for() at
each call; nothing is configured in modules.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch

from gr.errors import InstallError
from gr.logging import get_logger, log_once
from gr.ops import fbgemm, native, triton

Backend = Literal["native", "torch", "triton"]
Forced = Literal[Backend, "fbgemm"]

_logger = get_logger(__name__)
_forced: ContextVar[Forced | None] = ContextVar("gr.ops forced backend", default=None)


def backend_for(device: torch.device) -> Backend:
    """The implementation that tensors on `device` use now. The first call may build the C++ operators (20 seconds).

    Raises InstallError for CUDA tensors where Triton does not run.
    """
    forced = _forced.get()
    return "triton" if forced == "fbgemm" else forced or _detected(device.type)


def fbgemm_forced() -> bool:
    """Whether HSTU attention is to run by FBGEMM's kernels. They have no other operator, so no other asks."""
    return _forced.get() == "fbgemm"


@contextlib.contextmanager
def force_backend(name: Literal[Forced, "auto"]) -> Iterator[None]:
    """Use one implementation inside a `with` block; "auto" changes nothing.

    Raises ValueError for another name, and InstallError if it cannot be had on this machine: "triton" needs what
    gr.ops.triton.load() says, "fbgemm" what gr.ops.fbgemm.load() says, too.
    """
    if name == "auto":
        yield
        return
    if name not in get_args(Forced):
        raise ValueError(f"backend must be 'native', 'torch', 'triton' or 'fbgemm', not {name!r}")
    if name == "native":
        native.load()
    elif name == "triton":
        triton.load()
    elif name == "fbgemm":
        fbgemm.load()
        triton.load()
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _detected(device_type: str) -> Backend:
    if device_type == "cuda":
        triton.load()
        return "triton"
    if device_type == "cpu":
        try:
            native.load()
            return "native"
        except InstallError as error:
            log_once(_logger, f"CPU operators fall back to plain PyTorch, which is several times slower: {error}")
    return "torch"

"""The one rule that says which implementation of an operator runs.

"native": C++ built on this machine (gr.ops.native), for CPU tensors. "triton": for CUDA tensors. "torch": plain PyTorch
on any device, taken for CPU tensors where there is no C++ compiler, which is said. On a GPU nothing is taken instead of
Triton unless forced: CUDA builds of torch bring it, and hours of a GPU cost more than its remedy. "fbgemm": HSTU attention by FBGEMM's CUTLASS kernels, and everything else
as under "triton"; only when forced. Operators ask backend_for() at each call; nothing is configured in modules.
"""

import contextlib
import functools
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch

from gr.errors import InstallError
from gr.logging import get_logger, log_once
from gr.ops import fbgemm, native

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

    Raises ValueError for another name, and InstallError if it cannot be had on this machine: "triton" needs a CUDA
    device, or TRITON_INTERPRET=1 in the environment, which runs its kernels slowly on CPU tensors; "fbgemm" needs what
    gr.ops.fbgemm.load() says, too.
    """
    if name == "auto":
        yield
        return
    if name not in get_args(Forced):
        raise ValueError(f"backend must be 'native', 'torch', 'triton' or 'fbgemm', not {name!r}")
    if name == "native":
        native.load()
    elif name == "triton":
        _require_triton()
    elif name == "fbgemm":
        fbgemm.load()
        _require_triton()
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise InstallError("triton is not installed: it comes with CUDA builds of torch, or pip install triton==3.7.1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise InstallError("backend 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set before Python starts")
    from triton.runtime import driver

    try:
        driver.active  # noqa: B018 (builds a C module, or takes it from Triton's cache, as the first kernel would)
    except (RuntimeError, AssertionError, ImportError, OSError, subprocess.SubprocessError) as error:
        raise InstallError(
            f"triton does not start on this machine ({' '.join(str(error).split())}): it builds a C module when it does, "
            "so install a C compiler with the headers of C and of Python (Debian: gcc libc6-dev libpython3-dev), or take "
            "slower operators with trainer.operators=torch"
        ) from error


@functools.cache
def _detected(device_type: str) -> Backend:
    if device_type == "cuda":
        _require_triton()
        return "triton"
    if device_type == "cpu":
        try:
            native.load()
            return "native"
        except InstallError as error:
            log_once(_logger, f"CPU operators fall back to plain PyTorch, which is several times slower: {error}")
    return "torch"

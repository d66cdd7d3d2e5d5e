"""The one rule that says which implementation of an operator runs on CPU tensors.

"native": C++ built on this machine (gr.ops.native). "torch": plain PyTorch, where that cannot be built. Operators ask
cpu_backend() at each call; nothing is configured in modules.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

from gr.errors import InstallError
from gr.logging import get_logger, log_once
from gr.ops import native

Backend = Literal["native", "torch"]

_logger = get_logger(__name__)
_forced: ContextVar[Backend | None] = ContextVar("gr.ops forced backend", default=None)


def cpu_backend() -> Backend:
    """The implementation that CPU tensors use now. The first call may build the C++ operators (about 20 seconds)."""
    return _forced.get() or _detected()


@contextlib.contextmanager
def force_backend(name: Backend) -> Iterator[None]:
    """Use one implementation inside a `with` block, for tests and comparisons.

    Raises ValueError for another name, and InstallError if "native" cannot be had on this machine.
    """
    if name not in ("native", "torch"):
        raise ValueError(f"backend must be 'native' or 'torch', not {name!r}")
    if name == "native":
        native.load()
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _detected() -> Backend:
    try:
        native.load()
    except InstallError as error:
        log_once(_logger, f"CPU operators fall back to plain PyTorch, which is several times slower: {error}")
        return "torch"
    return "native"

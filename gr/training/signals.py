"""Signals that ask a run to stop, and to leave at once."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# One request may arrive twice: Slurm and a terminal signal every process, and torchrun passes its own signal on.
ONE_REQUEST_SECONDS = 3.0


class Interrupted(BaseException):
    """Asked to stop where there is nothing to save."""


@contextmanager
def on_stop_signal(ask: Callable[[], None]) -> Iterator[None]:
    """Calls `ask` at the first of STOP_SIGNALS. A SIGTERM or SIGINT that comes ONE_REQUEST_SECONDS or more after the
    first of these two raises KeyboardInterrupt.

    SIGUSR1 never does: it is a launcher's own, which may reach a rank long before or after the scheduler's SIGTERM.
    """
    requested, first = False, math.inf

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal requested, first
        if number != signal.SIGUSR1:
            if time.monotonic() - first >= ONE_REQUEST_SECONDS:
                raise KeyboardInterrupt
            first = min(first, time.monotonic())
        if not requested:
            requested = True
            ask()

    before = {number: signal.signal(number, hear) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

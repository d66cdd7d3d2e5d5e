"""Signals that ask a run to stop, and to leave at once."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# One request may arrive twice: Slurm and a terminal signal every process, and torchrun passes its own signal on.
ONE_REQUEST_SECONDS = 3.0


class Interrupted(BaseException):
    """Asked to stop where there is nothing to save."""


@contextmanager
def on_stop_signal(ask: Callable[[], None]) -> Iterator[None]:
    """Calls `ask` at the first of STOP_SIGNALS. A SIGTERM or SIGINT that comes ONE_REQUEST_SECONDS or more after the
    first of these two raises KeyboardInterrupt.

    SIGUSR1 never does: it is a launcher's own, which may reach a rank long before or after the scheduler's SIGTERM. Nor
    does SIGHUP of a terminal that closes, which nohup may have chosen to ignore: then it is ignored here, too.
    """
    requested, first = False, math.inf

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal requested, first
        if number in (signal.SIGINT, signal.SIGTERM):
            if time.monotonic() - first >= ONE_REQUEST_SECONDS:
                raise KeyboardInterrupt
            first = min(first, time.monotonic())
        if not requested:
            requested = True
            ask()

    heard = [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

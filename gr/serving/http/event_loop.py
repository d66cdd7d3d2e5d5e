"""A loaded server's part of the event loop: answers of other threads by one wake-up, and how late requests are read."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from gr.logging import get_logger

log = get_logger(__name__)
_LOOK = 0.005  # seconds from what is read until the loop is asked how late it is
_HALF_LIFE = 1.0  # seconds in which lateness that was found counts half


class Answers:
    """Brings the engine's answers into the event loop, all those of a batch at once.

    A wake-up for each would make the thread that answers give the interpreter away each time, and wait for it for up to
    sys.getswitchinterval() seconds.
    """

    def __init__(self) -> None:
        self._done: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._awake = False

    def add(self, loop: asyncio.AbstractEventLoop, take: Callable[[Any], None], result: Any) -> None:
        """Calls `take` with `result` in the loop. It may be called in any thread."""
        self._done.append((take, result))
        if not self._awake and not loop.is_closed():
            self._awake = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._awake = False  # first, so that what is added from now on wakes the loop again
        while self._done:
            take, result = self._done.popleft()
            try:
                take(result)
            except Exception:
                log.exception("an answer could not be given")


class Lateness:
    """How long requests have lain in their sockets when they are read, about: as long as the loop is behind its timers.

    A timer is set whenever something is read and none is running. The longest time counts, and the less the longer ago
    it was found: what is late once is mostly late again soon.
    """

    def __init__(self) -> None:
        self._due: float | None = None
        self._seconds = self._found = 0.0

    def seconds(self, loop: asyncio.AbstractEventLoop) -> float:
        """The lateness of a request that is read now."""
        now = time.monotonic()
        self._add(0.0 if self._due is None else now - self._due, now)
        if self._due is None:
            self._due = now + _LOOK
            loop.call_later(_LOOK, self._look)
        return self._seconds

    def _look(self) -> None:
        assert self._due is not None
        now = time.monotonic()
        self._add(now - self._due, now)
        self._due = None

    def _add(self, seconds: float, now: float) -> None:
        self._seconds = max(seconds, self._seconds * 0.5 ** ((now - self._found) / _HALF_LIFE))
        self._found = now

"""Requests to stop a node: signals are recorded from its start to its end, and end nothing by themselves."""

import signal
from types import FrameType, TracebackType
from typing import Self

# HUP: the terminal, or the connection to it, is gone. (Under nohup it is ignored, here too.)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stop:
    """A context in which signals are only recorded."""

    def __init__(self) -> None:
        self._received: list[int] = []

    @property
    def asked(self) -> bool:
        return bool(self._received)

    @property
    def at_once(self) -> bool:
        """True after a second Ctrl-C."""
        return self._received.count(signal.SIGINT) > 1

    def __enter__(self) -> Self:
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

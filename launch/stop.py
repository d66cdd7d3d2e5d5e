"""Asking a node to stop: signals are remembered from its start to its end, and end nothing by themselves."""

import signal
from types import FrameType, TracebackType
from typing import Self

# HUP: the terminal, or the connection to it, is gone. (nohup ignores it, and so do we then.)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stop:
    """Within it, signals are only counted."""

    def __init__(self) -> None:
        self._heard: list[int] = []

    @property
    def asked(self) -> bool:
        return bool(self._heard)

    @property
    def at_once(self) -> bool:
        """A second Ctrl-C."""
        return self._heard.count(signal.SIGINT) > 1

    def __enter__(self) -> Self:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard.append(number)

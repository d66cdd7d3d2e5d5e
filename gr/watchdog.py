"""A watchdog that ends a process that hangs, after writing a report of what it was doing.

Code reports its progress with enter(), which costs nanoseconds and does nothing without a watchdog. Every rank watches
itself, so all of them report, not only the late one.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gr.logging import get_logger

log = get_logger(__name__)
TICK_SECONDS = 1.0
STDERR = 2
# Seconds between the report and the end of the process: ranks are late by different amounts, and each should report
# before the end of a peer breaks its collective.
GRACE_SECONDS = 10.0
_PACKAGE = str(Path(__file__).parent)

_watch: "_Watch | None" = None


def enter(place: str, budget: str | None = None) -> None:
    """Sets the place of this process in reports. budget: the time limit to start; None keeps the last one."""
    if _watch is not None:
        _watch.place = place
        if budget is not None:
            _watch.clock = budget, time.monotonic()


def add_detail(detail: Callable[[Path], str]) -> None:
    """Adds a line to reports: the result of a function of the folder to write into, such as the current collective."""
    if _watch is not None:
        _watch.details.append(detail)


@contextmanager
def watching(limits: Mapping[str, float], folder: Path, rank: int) -> Iterator[None]:
    """Watches the calling thread. limits: seconds by budget; the first budget starts at once.

    A report is a log line and folder/stacks-rank-R.txt; then the process ends with code 1.
    """
    global _watch
    assert _watch is None, "a process watches itself once"
    _watch = _Watch(limits, folder, rank)
    try:
        yield
    finally:
        _watch.stop()
        _watch = None


class _Watch:
    def __init__(self, limits: Mapping[str, float], folder: Path, rank: int) -> None:
        self.limits, self.folder, self.rank = dict(limits), folder, rank
        self.place = "the start"
        self.clock = next(iter(self.limits)), time.monotonic()
        self.details: list[Callable[[Path], str]] = []
        self._watched = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gr-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._stopped.wait(min(TICK_SECONDS, min(self.limits.values()) / 4)):
            budget, since = self.clock
            remaining = since + self.limits[budget] - time.monotonic()
            if remaining < 0:
                self._report(budget, since)
                time.sleep(GRACE_SECONDS)
                sys.stderr.flush()
                os._exit(1)
            # Native code may never release the interpreter; faulthandler's own timer does not need it.
            faulthandler.dump_traceback_later(remaining + 2 * GRACE_SECONDS, exit=True, file=STDERR)

    def _report(self, budget: str, since: float) -> None:
        path = self.folder / f"stacks-rank-{self.rank}.txt"
        line = (
            f"rank {self.rank} on {socket.gethostname()} is in {self.place} for {time.monotonic() - since:.0f} s "
            f"(trainer.timeouts.{budget}={self.limits[budget]:g}), {_innermost(sys._current_frames()[self._watched])}"
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(line + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
                for detail in self.details:
                    text = detail(self.folder)
                    file.write(f"\n{text}\n")
                    line += f", {text}"
        except OSError as error:
            faulthandler.dump_traceback(STDERR)
            path = Path(f"above ({error})")
        log.error("%s: ending it; stacks: %s", line, path)


def _innermost(frame: FrameType) -> str:
    """The innermost line of this package on the stack, and the function that it called into."""
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if entry.filename.startswith(_PACKAGE)] or stack[-1:]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}"
    return place if stack[-1] is own[-1] else f"{place} -> {stack[-1].name}"

"""Ends a process that hangs, after writing where it stands.

Code says where it is with enter(), which costs nothing to speak of and does nothing where no one watches. Every rank
watches itself, so all of them report, not only the one that is late.
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
# Between report and end: ranks are late by different amounts, and each should report before a peer's end breaks its
# collective.
GRACE_SECONDS = 10.0
_PACKAGE = str(Path(__file__).parent)

_watch: "_Watch | None" = None


def enter(place: str, budget: str | None = None) -> None:
    """Says where this process is from now on. budget: the limit that starts to run; without one the last runs on."""
    if _watch is not None:
        _watch.place = place
        if budget is not None:
            _watch.clock = budget, time.monotonic()


def add_detail(detail: Callable[[Path], str]) -> None:
    """What else a report should say: a function of the folder to write into, such as the collective under way."""
    if _watch is not None:
        _watch.details.append(detail)


@contextmanager
def watching(limits: Mapping[str, float], folder: Path, rank: int) -> Iterator[None]:
    """Watches the thread that calls it. limits: seconds by budget; the first one starts to run.

    Reports are a log line and folder/stacks-rank-R.txt; then the process ends with code 1.
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
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gr-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._over.wait(min(TICK_SECONDS, min(self.limits.values()) / 4)):
            budget, since = self.clock
            left = since + self.limits[budget] - time.monotonic()
            if left < 0:
                self._report(budget, since)
                time.sleep(GRACE_SECONDS)
                sys.stderr.flush()
                os._exit(1)
            # For native code that never gives the interpreter back: this clock needs no interpreter.
            faulthandler.dump_traceback_later(left + 2 * GRACE_SECONDS, exit=True, file=STDERR)

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
                    said = detail(self.folder)
                    file.write(f"\n{said}\n")
                    line += f", {said}"
        except OSError as error:
            faulthandler.dump_traceback(STDERR)
            path = Path(f"above ({error})")
        log.error("%s: ending it; stacks: %s", line, path)


def _innermost(frame: FrameType) -> str:
    """The deepest line of this package under way, and the function that it called into."""
    stack = traceback.extract_stack(frame)
    ours = [entry for entry in stack if entry.filename.startswith(_PACKAGE)] or stack[-1:]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
    return where if stack[-1] is ours[-1] else f"{where} -> {stack[-1].name}"

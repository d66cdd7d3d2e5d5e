"""Follows a package: another version is opened beside the one that is served, then takes its place."""

import threading
from collections.abc import Callable

from gr.errors import GRError
from gr.files import is_transient
from gr.logging import get_logger
from gr.serving.engine import Engine
from gr.serving.servable import ServedVersion

log = get_logger(__name__)


class Watch:
    """Looks every `seconds` until it is closed.

    A version that cannot be opened is logged and counted, once, and the one before is still served.
    """

    def __init__(
        self, engine: Engine, current: Callable[[], str], open_version: Callable[[], ServedVersion], seconds: float
    ) -> None:
        """current: the name of the version to serve, as the package has it. open_version: opens that one."""
        self._engine, self._current, self._open, self._seconds = engine, current, open_version, seconds
        self._failed: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        name = "the package"  # while its current.json cannot be read
        try:
            name = self._current()
            if name not in (self._engine.version.name, self._failed):
                self._engine.swap(self._open())
        except (GRError, OSError) as error:
            if is_transient(error):
                log.warning("version %s is still served: %s; looks again", self._engine.version.name, error)
            elif name != self._failed:
                self._failed = name
                self._engine.metrics.swap_failed()
                log.error("version %s is still served: %s", self._engine.version.name, error)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

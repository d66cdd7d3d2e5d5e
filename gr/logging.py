"""Plain log lines on stderr. Only rank 0 logs below WARNING; lines of other ranks begin with the rank."""

import logging
import sys
import threading

from gr.errors import printable

_ROOT = "gr"
_logged: set[tuple[str, str]] = set()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass `__name__`. Names outside gr are placed under it, so `configure` reaches them."""
    inside = name == _ROOT or name.startswith(f"{_ROOT}.")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")


def log_once(logger: logging.Logger, message: str, level: int = logging.WARNING) -> None:
    """Logs a message the first time in this process, and not again. The caller still counts every occurrence."""
    key = (logger.name, message)
    if key not in _logged:
        _logged.add(key)
        logger.log(level, message)


def configure(rank: int = 0) -> None:
    """Sends gr's log lines to stderr, from INFO on rank 0, from WARNING elsewhere. A later call replaces this one."""
    handler = _CurrentStderr()
    handler.setFormatter(_PlainFormatter(rank))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False  # a library that configures the root logger would print every line twice
    threading.excepthook = _thread_failed


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Shows an error of the disk that ends a thread, such as TensorBoard's, in one line; its user meets it too."""
    if isinstance(failed.exc_value, OSError):
        get_logger(__name__).error("%s: %s", failed.thread.name if failed.thread else "a thread", failed.exc_value)
    else:
        threading.__excepthook__(failed)


class _CurrentStderr(logging.StreamHandler):
    """A handler that looks up sys.stderr at each line, so that redirected and captured streams are honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _PlainFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._prefix = f"[rank {rank}] " if rank else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self._prefix}{level}{printable(record.message)}"

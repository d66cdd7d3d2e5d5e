"""The requests that wait for one verb, and how long they will wait: admission, deadlines and batches."""

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from gr.config.serving import EngineConfig
from gr.errors import TransientError
from gr.serving.servable import Encoded, Unavailable

_FORGET = 0.95  # weight of a batch against the one after it: the last twenty or so count
_OUTLIER = 3.0  # times the estimate: more of one batch is the machine's doing, and counts as this much
_FEW = 5  # weighted batches: so few that took _OUTLIER times as long as the next one were a start, and are forgotten
_MARGIN = 1.25  # times the estimate that a request has to have left, which may be off


class Overloaded(Unavailable, TransientError):
    """A request cannot be answered inside its deadline. retry_after: seconds until the queue has room, about."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Promise(Protocol):
    """The side of a concurrent.futures.Future that the engine writes, in its own threads."""

    def set_running_or_notify_cancel(self) -> bool: ...

    def cancelled(self) -> bool: ...

    def set_result(self, answer: Any, /) -> None: ...

    def set_exception(self, error: BaseException, /) -> None: ...


@dataclass(slots=True, eq=False)  # two requests are never one, and arrays cannot be compared
class Request:
    """encoded: of `version`, which is whatever the caller holds. arrived, deadline: of time.monotonic()."""

    version: Any
    encoded: Encoded
    deadline: float
    promise: Promise
    arrived: float = field(default_factory=time.monotonic)


class BatchTime:
    """Seconds of a batch, as `fixed + row * rows`: least squares over the recent batches, older ones weighing less."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_squared = self._product = 0.0
        self.fixed = self.row = 0.0

    def add(self, rows: int, seconds: float) -> None:
        rows = max(rows, 1)  # a request may be empty, such as a history without events that are known
        if self._weight > _FEW:
            seconds = min(seconds, _OUTLIER * (self.fixed + self.row * rows))
        elif self._weight and self._seconds * min(1 / self._weight, rows / self._rows) > _OUTLIER * seconds:
            self._weight = self._rows = self._seconds = self._rows_squared = self._product = 0.0
        self._weight = _FORGET * self._weight + 1
        self._rows = _FORGET * self._rows + rows
        self._seconds = _FORGET * self._seconds + seconds
        self._rows_squared = _FORGET * self._rows_squared + rows * rows
        self._product = _FORGET * self._product + rows * seconds
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_squared / self._weight - mean_rows**2
        covariance = self._product / self._weight - mean_rows * mean_seconds
        # Batches of one size say nothing about a row; half of the time is then as good a guess as any.
        slope = covariance / variance if variance > 0.01 * mean_rows**2 else mean_seconds / mean_rows / 2
        self.row = min(max(slope, 0.0), mean_seconds / mean_rows)
        self.fixed = mean_seconds - self.row * mean_rows

    def of(self, rows: float, batch_rows: float) -> float:
        """Seconds of `rows` in batches of `batch_rows` at most."""
        return math.ceil(rows / max(batch_rows, 1)) * self.fixed + rows * self.row

    def rows_within(self, seconds: float) -> float:
        """Rows of a batch that takes `seconds`, or a quarter more than a batch without rows where that is longer."""
        return max(seconds - self.fixed, self.fixed / 4) / self.row if self.row else math.inf


class BatchQueue:
    """Requests of one verb, oldest first. A batch is what waits, of one version, up to `batch_rows`.

    It is smaller where it would take more than half of the deadline: what comes while a batch runs waits for all of it,
    and has to be answered by the next. A request is refused when it arrives where the estimate says that its deadline
    would pass, so that its caller knows at once; one that is late all the same is dropped, and does not make batches
    small. A request that finds nothing before it is always run, and one a worker always waits: estimates learn from
    what runs only.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._batch_rows, self._queue_rows, self._workers = config.batch_rows, config.queue_rows, config.workers
        self._longest = config.deadline_ms / 1e3 / 2 / _MARGIN  # seconds of a batch
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running: dict[int, float] = {}  # thread -> when its batch should end
        self.time = BatchTime()
        self.rows = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether a request would be run at once."""
        return not self._waiting and len(self._running) < self._workers

    def put(self, request: Request) -> None:
        """Raises Overloaded, and Unavailable where the engine is closed."""
        rows = request.encoded.rows
        with self._changed:
            self._admit(rows, request.deadline)
            self._waiting.append(request)
            self.rows += rows
            self._changed.notify()

    def require_room(self, deadline: float) -> None:
        """Raises what `put` would of a request that costs nothing itself, before anything is spent on it."""
        with self._changed:
            self._admit(0, deadline)

    def _admit(self, rows: int, deadline: float) -> None:
        if self._closed:
            raise Unavailable("the engine is closed")
        if self.is_idle:
            return
        waiting_rows = self.rows + rows
        is_full = waiting_rows > self._queue_rows
        if not is_full and len(self._waiting) < self._workers:
            return
        now = time.monotonic()
        busy = len(self._running) >= self._workers
        ends = max(0.0, min(self._running.values()) - now) if busy else 0.0
        wait = ends + self.time.of(waiting_rows, self._most_rows()) / self._workers
        if is_full:
            raise Overloaded(f"{self.rows:,} rows wait, at most {self._queue_rows:,}; try again later", wait)
        if now + _MARGIN * wait > deadline:
            left = 1e3 * max(0.0, deadline - now)
            raise Overloaded(
                f"{self.rows:,} rows wait, so an answer takes about {1e3 * wait:.0f} ms, and the deadline is in "
                f"{left:.0f} ms; try again later",
                wait,
            )

    def _most_rows(self) -> float:
        return max(1.0, min(self._batch_rows, self.time.rows_within(self._longest)))

    def take(self) -> tuple[list[Request], list[Request]]:
        """The next batch, and the requests that are too late or cancelled; waits until there is one of either.

        Both are empty when the queue is closed and nothing waits any more.
        """
        with self._changed:
            self._running.pop(threading.get_ident(), None)
            while not self._waiting and not self._closed:
                self._changed.wait()
            batch, late = self._next()
            if batch:
                rows = sum(request.encoded.rows for request in batch)
                self._running[threading.get_ident()] = time.monotonic() + self.time.of(rows, rows)
            return batch, late

    def _next(self) -> tuple[list[Request], list[Request]]:
        now, most, rows = time.monotonic(), self._most_rows(), 0
        batch: list[Request] = []
        late: list[Request] = []
        while self._waiting:
            request = self._waiting[0]
            total = rows + request.encoded.rows
            if batch and (total > most or request.version is not batch[0].version):
                break
            self._waiting.popleft()
            self.rows -= request.encoded.rows
            if request.promise.set_running_or_notify_cancel() and request.deadline > now:
                batch.append(request)
                rows = total
            else:
                late.append(request)
        while len(batch) > 1:
            first = min(batch, key=lambda request: request.deadline)
            if now + self.time.of(rows, rows) <= first.deadline:
                break
            batch.remove(first)
            late.append(first)
            rows -= first.encoded.rows
        return batch, late

    def close(self) -> None:
        """Nothing is admitted any more; what waits is still answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

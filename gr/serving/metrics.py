"""Counters and histograms of an engine; the server shows them in the text format of Prometheus."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from gr.serving.batch_queue import Overloaded
from gr.serving.servable import RequestError

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
SIZES = tuple(2**power for power in range(0, 15))


class Histogram:
    """counts: values up to each of `bounds`, and above the last; not yet cumulative."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class VerbMetrics:
    """outcomes: requests by what became of them: ok, invalid, overloaded, failed, cancelled."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.request_seconds, self.batch_seconds = Histogram(SECONDS), Histogram(SECONDS)
        self.batch_requests, self.batch_rows = Histogram(SIZES), Histogram(SIZES)


class EngineMetrics:
    """The counters of an engine, by verb. Threads may add to it and read it at any time."""

    def __init__(self, verbs: Iterable[str]) -> None:
        self.verbs = {verb: VerbMetrics() for verb in verbs}
        self.swaps = self.swap_failures = 0
        self._lock = threading.Lock()

    def refused(self, verb: str, error: BaseException) -> None:
        with self._lock:
            self.verbs[verb].outcomes[outcome(error)] += 1

    def cancelled(self, verb: str, requests: int) -> None:
        if requests:
            with self._lock:
                self.verbs[verb].outcomes["cancelled"] += requests

    def batch(self, verb: str, requests: int, rows: int, seconds: float) -> None:
        with self._lock:
            metrics = self.verbs[verb]
            metrics.batch_requests.add(requests)
            metrics.batch_rows.add(rows)
            metrics.batch_seconds.add(seconds)

    def answered(self, verb: str, results: Sequence[tuple[float, BaseException | None]]) -> None:
        """results: of each request, the seconds from its arrival to its answer, and its error."""
        with self._lock:
            metrics = self.verbs[verb]
            for seconds, error in results:
                metrics.outcomes[outcome(error)] += 1
                if error is None:
                    metrics.request_seconds.add(seconds)

    def swapped(self) -> None:
        with self._lock:
            self.swaps += 1

    def swap_failed(self) -> None:
        with self._lock:
            self.swap_failures += 1


def outcome(error: BaseException | None) -> str:
    """The word for what became of a request."""
    if error is None:
        return "ok"
    if isinstance(error, RequestError):
        return "invalid"
    return "overloaded" if isinstance(error, Overloaded) else "failed"

"""The engine: requests answered in batches by worker threads, by a version that can be swapped under load."""

import gc
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gr.config.serving import EngineConfig
from gr.dist import keep_freed_memory
from gr.errors import ServingError, nearest
from gr.logging import get_logger
from gr.serving.batch_queue import BatchQueue, Overloaded, Promise, Request
from gr.serving.metrics import EngineMetrics
from gr.serving.package.version import Version
from gr.serving.servable import RequestError, Servable, ServedVersion, Unavailable

log = get_logger(__name__)


def settle_process() -> None:
    """Makes a process that serves, and has what it serves open, steady. For entry points.

    It keeps freed memory; and what libraries and the model hold is never garbage, though to look through it takes a
    tenth of a second.
    """
    keep_freed_memory()
    gc.collect()
    gc.freeze()


class Answer(NamedTuple):
    """version: the name of the one version that encoded the request and computed all of `outputs`."""

    version: str
    outputs: dict[str, np.ndarray]
    queue_seconds: float
    run_seconds: float


class _Held:
    """A version and the number of its requests that are not yet answered. It is closed when retired and at none."""

    def __init__(self, version: ServedVersion) -> None:
        self.version = version
        self._lock = threading.Lock()
        self._requests, self._retired = 0, False

    def acquire(self) -> bool:
        """False where the version is retired, and so another one is served."""
        with self._lock:
            self._requests += not self._retired
            return not self._retired

    def release(self, requests: int = 1) -> None:
        with self._lock:
            self._requests -= requests
            last = self._retired and not self._requests
        if last:
            self.version.close()

    def retire(self) -> None:
        with self._lock:
            self._retired, last = True, not self._requests
        if last:
            self.version.close()


class Engine:
    """Answers requests of one version; another version takes its place with `swap`, and no answer is of both.

    `ask` blocks; `submit` returns a future. Both raise RequestError where the request is wrong, Overloaded where it
    cannot be answered inside its deadline. It is safe to call from any thread; close it, or use it in a `with`.
    """

    def __init__(self, version: ServedVersion, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.metrics = EngineMetrics(version.verbs)
        self._held = _Held(version)
        self._swapping = threading.Lock()
        self._closed = False
        self._queues = {verb: BatchQueue(self.config) for verb in version.verbs}
        self._threads = [
            threading.Thread(target=self._work, args=(verb,), name=f"{verb}-{number}", daemon=True)
            for verb in self._queues
            for number in range(self.config.workers)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(cls, package: str | Path, config: EngineConfig | None = None) -> "Engine":
        """An engine of the version that a package serves. Raises ServingError, as Version.open does."""
        config = config or EngineConfig()
        return cls(Version.open(package, runners=config.workers), config)

    @property
    def version(self) -> ServedVersion:
        """The version that new requests get."""
        return self._held.version

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self._closed and self.version.ready

    def servable(self, verb: str) -> Servable:
        """Raises ServingError for a verb that this kind of model does not have."""
        try:
            return self.version.verbs[verb]
        except KeyError:
            raise ServingError(
                f"a {self.version.kind} model has no {verb}: {nearest(verb, self._queues, 'verbs')}"
            ) from None

    @property
    def verbs(self) -> list[str]:
        """The verbs that requests may name; every version has the same."""
        return list(self._queues)

    def waiting(self) -> dict[str, int]:
        """Rows that wait, by verb."""
        return {verb: queue.rows for verb, queue in self._queues.items()}

    def ask(self, verb: str, columns: Mapping[str, Any], *, deadline_ms: float | None = None) -> dict[str, np.ndarray]:
        """One answer, by the names of the verb's outputs.

        columns: arrays, what numpy makes arrays of, or mappings where the verb takes them, such as a history.
        """
        arrays: dict[str, Any] = {
            name: value if isinstance(value, Mapping) else np.asarray(value) for name, value in columns.items()
        }
        return self.submit(verb, arrays, deadline_ms=deadline_ms).result().outputs

    def score(self, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The probabilities of rows, of a click model. columns: by name, each [B]."""
        return self.ask("score", columns)

    def rank(self, **columns: Any) -> dict[str, np.ndarray]:
        """The scores of candidates, of a ranking model: user=, history=, candidates=, and what its `inputs` name."""
        return self.ask("rank", columns)

    def retrieve(self, **columns: Any) -> dict[str, np.ndarray]:
        """The best items for a history, of a retrieval model: history=, k=."""
        return self.ask("retrieve", columns)

    def is_idle(self, verb: str) -> bool:
        """Whether a request would be run at once."""
        return self._queues[verb].is_idle

    def require_room(self, verb: str, arrived: float | None = None) -> None:
        """Raises Overloaded where a request would be refused now, so that its body need not be read.

        arrived: when it came, by time.monotonic(); None: now.
        """
        arrived = time.monotonic() if arrived is None else arrived
        try:
            self._queues[verb].require_room(arrived + self.config.deadline_ms / 1e3)
        except ServingError as error:
            self.metrics.refused(verb, error)
            raise

    def submit(
        self,
        verb: str,
        columns: Mapping[str, np.ndarray],
        *,
        deadline_ms: float | None = None,
        arrived: float | None = None,
    ) -> "Future[Answer]":
        """The answer to come.

        deadline_ms: from the request's arrival; that of the configuration is the longest. arrived: as in require_room.
        """
        future: Future[Answer] = Future()
        self.submit_to(future, verb, columns, deadline_ms=deadline_ms, arrived=arrived)
        return future

    def submit_to(
        self,
        promise: Promise,
        verb: str,
        columns: Mapping[str, np.ndarray],
        *,
        deadline_ms: float | None = None,
        arrived: float | None = None,
    ) -> None:
        """Gives the answer to `promise`; otherwise as submit."""
        self.servable(verb)
        seconds = min(deadline_ms or self.config.deadline_ms, self.config.deadline_ms) / 1e3
        arrived, held = time.monotonic() if arrived is None else arrived, self._acquire()
        try:
            self._queues[verb].require_room(arrived + seconds)
            encoded = held.version.verbs[verb].encode(columns)
            if encoded.rows > self.config.request_rows:
                raise RequestError("rows", f"{encoded.rows:,} in one request, at most {self.config.request_rows:,}")
            self._queues[verb].put(Request(held, encoded, arrived + seconds, promise, arrived))
        except BaseException as error:
            held.release()
            self.metrics.refused(verb, error)
            raise

    def _acquire(self) -> _Held:
        while not (held := self._held).acquire():  # a swap came between the two
            if self._closed:
                raise Unavailable("the engine is closed")
        return held

    def swap(self, version: ServedVersion) -> float:
        """Serves `version` from now on, and returns the seconds for which a new request could have had neither.

        Requests that were accepted before are answered by the version that encoded them, which is closed after the
        last. Raises ServingError, and closes `version`, where it is of another kind of model.
        """
        old = self.version
        if (version.kind, set(version.verbs)) != (old.kind, set(self.verbs)):
            message = (
                f"version {version.name} is of a {version.kind} model with {', '.join(sorted(version.verbs))}; "
                f"served is a {old.kind} model with {', '.join(sorted(self.verbs))}: serve it by another engine"
            )
            version.close()
            raise ServingError(message)
        held = _Held(version)
        with self._swapping:
            if self._closed:
                version.close()
                raise Unavailable("the engine is closed")
            started = time.perf_counter()
            retired, self._held = self._held, held
            seconds = time.perf_counter() - started
            retired.retire()
        self.metrics.swapped()
        log.info("version %s is served, in place of %s", version.name, old.name)
        return seconds

    def _work(self, verb: str) -> None:
        torch.set_num_threads(self.config.torch_threads)  # of this thread: more threads on small batches cost, not gain
        queue = self._queues[verb]
        while any(taken := queue.take()):
            batch, late = taken
            now = time.monotonic()
            for request in late:
                waited = 1e3 * (now - request.arrived)
                error = Overloaded(f"not answered in its {waited:.0f} ms; try again later", 0.0)
                self._finish(verb, [request], [error])
            if batch:
                self._answer(verb, queue, batch)

    def _answer(self, verb: str, queue: BatchQueue, batch: Sequence[Request]) -> None:
        held, rows = batch[0].version, sum(request.encoded.rows for request in batch)
        started = time.monotonic()
        try:
            outputs = held.version.verbs[verb].run([request.encoded for request in batch])
        except Exception as error:
            if len(batch) == 1:
                failed = "%s of version %s failed on %d rows", verb, held.version.name, rows
                if isinstance(error, ServingError):  # the line says it all, such as that a card has ended
                    log.error(f"{failed[0]}: %s", *failed[1:], error)
                else:
                    log.exception(*failed)
                self._finish(verb, batch, [error])
                return
            for request in batch:  # so that the one at fault fails alone
                self._answer(verb, queue, [request])
            return
        ended = time.monotonic()
        queue.time.add(rows, ended - started)
        self.metrics.batch(verb, len(batch), rows, ended - started)
        name, run_seconds = held.version.name, ended - started
        self._finish(
            verb,
            batch,
            [
                columns
                if isinstance(columns, RequestError)
                else Answer(name, columns, started - request.arrived, run_seconds)
                for request, columns in zip(batch, outputs, strict=True)
            ],
        )

    def _finish(self, verb: str, requests: Sequence[Request], results: Sequence[Answer | Exception]) -> None:
        """Gives requests of one version their results, all of them by one look at each lock."""
        now = time.monotonic()
        requests[0].version.release(len(requests))
        kept = [each for each in zip(requests, results, strict=True) if not each[0].promise.cancelled()]
        self.metrics.cancelled(verb, len(requests) - len(kept))
        self.metrics.answered(
            verb,
            [(now - request.arrived, None if isinstance(result, Answer) else result) for request, result in kept],
        )
        for request, result in kept:
            if isinstance(result, Answer):
                request.promise.set_result(result)
            else:
                request.promise.set_exception(result)

    def close(self) -> None:
        """Answers what waits, then gives the version back. Requests after it are refused."""
        with self._swapping:
            if self._closed:
                return
            self._closed = True
        for queue in self._queues.values():
            queue.close()
        for thread in self._threads:
            thread.join()
        self._held.retire()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

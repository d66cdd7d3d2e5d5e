"""The engine or server under load. Requests are due at times that are given beforehand."""

import asyncio
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from gr.errors import ServingError
from gr.serving.batch_queue import Overloaded
from gr.serving.engine import Engine
from gr.serving.http.open_inference import JSON_LENGTH, write_request
from gr.serving.load import sender
from gr.serving.load.load_test import Columns, Run
from gr.serving.servable import TensorSpec


class _Outcomes:
    """The outcomes of the requests of a run. started: by time.monotonic(). Threads may add to it."""

    def __init__(self, arrivals: np.ndarray, started: float) -> None:
        self.started, self.due = started, arrivals.tolist()
        self.latencies = [math.inf] * len(arrivals)
        self.refused = self.failed = 0
        self._left, self._lock = len(arrivals), threading.Lock()
        self.all_there = threading.Event()

    def add(self, number: int, outcome: str) -> None:
        """outcome: ok, refused or failed."""
        if outcome == "ok":
            self.latencies[number] = time.monotonic() - self.started - self.due[number]
        with self._lock:
            self.refused += outcome == "refused"
            self.failed += outcome == "failed"
            self._left -= 1
            last = not self._left
        if last:
            self.all_there.set()

    def run(self) -> Run:
        seconds = time.monotonic() - self.started
        offered = len(self.due) / self.due[-1]
        return Run(offered, np.array(self.latencies), self.refused, self.failed, seconds)


class EngineTarget:
    """An engine in this process, asked as another process says; request i is `requests[i % len(requests)]`."""

    def __init__(self, engine: Engine, verb: str, requests: Sequence[Columns]) -> None:
        self._engine, self._verb, self._requests = engine, verb, requests

    def run(self, arrivals: np.ndarray) -> Run:
        with _sender(arrivals) as (started, counts):
            outcomes, sent = _Outcomes(arrivals, started), 0
            for count in counts:
                for number in range(sent, count):
                    columns = self._requests[number % len(self._requests)]
                    due = outcomes.started + outcomes.due[number]  # where this thread is behind, the request has waited
                    ask(self._engine, self._verb, columns, partial(outcomes.add, number), due)
                sent = count
            outcomes.all_there.wait()
        return outcomes.run()


def ask(engine: Engine, verb: str, columns: Columns, add: Callable[[str], None], arrived: float | None = None) -> None:
    """Submits a request. add: is called with its outcome, ok, refused or failed. arrived: as in Engine.submit."""

    def ended(error: BaseException | None) -> None:
        add("ok" if error is None else "refused" if isinstance(error, Overloaded) else "failed")

    try:
        future = engine.submit(verb, columns, arrived=arrived)
    except ServingError as error:
        ended(error)
    else:
        future.add_done_callback(lambda answered: ended(answered.exception()))


@contextmanager
def _sender(arrivals: np.ndarray) -> Iterator[tuple[float, Iterator[int]]]:
    """When a sender began, and how many requests have been due, whenever there are more. Raises ServingError."""
    command = [sys.executable, "-IS", sender.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None
        pipe = process.stdout.fileno()
        try:
            process.stdin.write(arrivals.astype(np.float64).tobytes())
            process.stdin.close()
            yield float(np.frombuffer(_some(pipe, 8))[0]), _counts(pipe, len(arrivals))
        finally:
            process.kill()


def _counts(pipe: int, last: int) -> Iterator[int]:
    count = 0
    while count < last:
        count = int.from_bytes(_some(pipe, 1 << 16)[-4:], sys.byteorder)
        yield count


def _some(pipe: int, most: int) -> bytes:
    """The bytes of the sender, whole writes of 4 or 8. Raises ServingError where it has ended."""
    if not (data := os.read(pipe, most)):
        raise ServingError("the process that says when requests are due has ended; its lines say why")
    return data


def http_request(host: str, model: str, columns: Columns, inputs: Sequence[TensorSpec]) -> bytes:
    """A request with its headers, in binary tensors."""
    body, json_bytes = write_request(columns, inputs)
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{JSON_LENGTH}: {json_bytes}\r\n\r\n".encode() + body


class HttpTarget:
    """A server; request i is `requests[i % len(requests)]` in binary tensors, on a connection that is free or new."""

    def __init__(
        self, address: tuple[str, int], model: str, requests: Sequence[Columns], inputs: Sequence[TensorSpec]
    ) -> None:
        self._address = address
        self._requests = [http_request(address[0], model, columns, inputs) for columns in requests]

    def run(self, arrivals: np.ndarray) -> Run:
        import uvloop  # of the extra `serve`, as what answers over HTTP is

        return uvloop.run(self._run(arrivals))

    async def _run(self, arrivals: np.ndarray) -> Run:
        loop = asyncio.get_running_loop()
        outcomes = _Outcomes(arrivals, time.monotonic())
        free: list[_Connection] = []
        connecting: set[asyncio.Task[None]] = set()

        async def connect(number: int) -> None:
            try:
                _, connection = await loop.create_connection(lambda: _Connection(outcomes, free), *self._address)
            except OSError:
                outcomes.add(number, "failed")
            else:
                connection.send(number, self._requests[number % len(self._requests)])

        for number, due in enumerate(outcomes.due):
            # Also where requests are late: answers are read meanwhile.
            await asyncio.sleep(max(0.0, outcomes.started + due - time.monotonic()))
            if free:
                free.pop().send(number, self._requests[number % len(self._requests)])
            else:
                task = loop.create_task(connect(number))
                connecting.add(task)
                task.add_done_callback(connecting.discard)
        while not outcomes.all_there.is_set():
            await asyncio.sleep(0.001)
        run = outcomes.run()
        for connection in free:
            connection.transport.close()
        return run


class _Connection(asyncio.Protocol):
    """A connection of the load generator, one request at a time. It is in `free` while it has none."""

    transport: asyncio.Transport

    def __init__(self, outcomes: _Outcomes, free: "list[_Connection]") -> None:
        self._outcomes, self._free = outcomes, free
        self._number: int | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def send(self, number: int, request: bytes) -> None:
        if self.transport.is_closing():
            self._outcomes.add(number, "failed")
            return
        self._number = number
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or self._number is None:
            return
        head = head.lower()
        length = int(head.partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        number, self._number, self._received = self._number, None, b""
        status = int(head[9:12])
        self._outcomes.add(number, "ok" if status == 200 else "refused" if status == 503 else "failed")
        if b"\r\nconnection: close" in head:
            self.transport.close()
        else:
            self._free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._number is not None:
            self._outcomes.add(self._number, "failed")
        if self in self._free:
            self._free.remove(self)

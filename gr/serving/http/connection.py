"""A connection of the HTTP server: uvicorn's, with inference past ASGI, and limits on number, headers and patience."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gr.serving.http.event_loop import Lateness
from gr.serving.http.inference import Inference
from gr.serving.http.served import Served


class LimitedConfig(uvicorn.Config):
    """uvicorn's configuration with what each Connection reads: what is served, and how late all of them are."""

    def __init__(self, app: Any, served: Served) -> None:
        self.served, self.lateness = served, Lateness()
        limits = served.limits
        super().__init__(
            app,
            host=limits.host,
            port=limits.port,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=min(limits.connections, 65535),
            timeout_keep_alive=int(max(1, limits.idle_seconds)),
            timeout_graceful_shutdown=limits.drain_seconds,
        )


class Connection(HttpToolsProtocol):
    """Closes what is too many, too long or too slow. uvicorn itself waits forever for a request to begin or to end.

    A timer runs while the client has something to do: `idle_seconds` until it begins a request, `read_seconds` for all
    of the request, and again for taking an answer that does not fit into the buffers of the socket.
    """

    config: LimitedConfig
    cycle: Any  # uvicorn's, or an Inference
    pipeline: deque[tuple[Any, Any]]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = self.config.served.limits
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._reading, self._header_bytes = False, 0
        self._answering: RequestResponseCycle | Inference | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(503, f"{self._limits.connections:,} connections are open; try again later")
        else:
            self._arm(self._limits.idle_seconds)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        if isinstance(cycle, Inference):
            cycle.start()
        else:
            super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._timer is not None:
            self._timer.cancel()
        waiting = [cycle for cycle, _ in self.pipeline]
        for each in (self._answering, *waiting):
            if isinstance(each, Inference):
                each.leave()
            elif each is not None:  # uvicorn tells the last request of several only, and the others' answers raise
                each.disconnected = True
                each.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._begin()  # also for blank lines in front of a request
        if self._header_bytes >= 0:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes > self._limits.header_bytes:
            self._too_long()

    def on_message_begin(self) -> None:
        self._begin()
        super().on_message_begin()

    def _begin(self) -> None:
        if not self._reading:
            self._reading, self._header_bytes = True, 0
            self._arm(self._limits.read_seconds)

    def on_headers_complete(self) -> None:
        self._header_bytes = -1  # what comes now is the body
        if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > self._limits.header_bytes:
            self._too_long()
            raise HttpParserError("headers")  # nothing of it reaches the application
        late = self.config.lateness.seconds(self.loop)
        arrived = time.monotonic() - late
        path = self.config.served.infer_path(self.url) if self.parser.get_method() == b"POST" else None
        if path is None:
            self.scope["state"]["arrived"] = arrived
            super().on_headers_complete()
            return
        previous, self.cycle = self.cycle, (inference := Inference(self, self.config.served, path, self.headers))
        # Its answer will wait as long again until it is written, so the engine has so much less time.
        inference.arrived, inference.begins = arrived, arrived - late
        inference.keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        inference.expects_continue = self.expect_100_continue
        if previous is None or previous.response_complete:
            self._start_asgi_task(inference, None)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((inference, None))

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, Inference):
            self.cycle.add(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading, self._header_bytes = False, 0
        self._disarm()
        if isinstance(self.cycle, Inference):
            self.cycle.end()
        else:
            super().on_message_complete()
        if self.cycle.response_complete:  # before all of its body had come
            self._arm(self._limits.idle_seconds)

    def proceed(self) -> None:
        """Tells a client that waits for it to send the body."""
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def answered(self) -> None:
        """The answer to an inference has been written."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif not self._reading:
            self._arm(self._limits.idle_seconds)

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():
            self._refuse(400, "this is no HTTP request")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm(self._limits.read_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm()
        if self._reading:
            self._arm(self._limits.read_seconds)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # close() would wait for the client to take the rest of an answer

    def _too_long(self) -> None:
        self._refuse(431, f"the headers are longer than {self._limits.header_bytes:,} bytes")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        self.write(status, {"content-type": "application/json"}, json.dumps({"error": message}).encode(), close=True)

    def write(self, status: int, headers: Mapping[str, str], body: bytes, *, close: bool) -> None:
        """Writes a whole answer. close: the connection ends with it."""
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()] + ["connection: close\r\n"] * close
        head = f"{''.join(lines)}content-length: {len(body)}\r\n\r\n".encode()
        date = [part for name, value in self.server_state.default_headers for part in (name, b": ", value, b"\r\n")]
        self.transport.write(b"".join([STATUS_LINE[status], *date, head, body]))
        if close:
            self.transport.close()

    def _arm(self, seconds: float) -> None:
        """Calls `_late` in `seconds`, not when it was armed for before. A timer that runs out earlier is left alone."""
        self._due = self.loop.time() + seconds
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(self._due, self._look)

    def _disarm(self) -> None:
        self._due = None

    def _look(self) -> None:
        self._timer = None
        if self._due is not None and self.loop.time() < self._due:
            self._timer = self.loop.call_at(self._due, self._look)
        elif self._due is not None:
            self._due = None
            self._late()

    def _late(self) -> None:
        # The answer to this request, or an earlier one, may be on its way; nothing else is written into it.
        in_body = self._header_bytes < 0
        begun = self.cycle is not None and (
            self.cycle.response_started if in_body else not self.cycle.response_complete
        )
        if self._reading and not begun:
            self._refuse(408, f"the request did not end within {self._limits.read_seconds:g} seconds")
        else:
            self.transport.abort()

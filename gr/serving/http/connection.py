"""A connection of the HTTP server: uvicorn's, with admission, and limits on its number, headers and patience."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gr.config.serving import ServeConfig
from gr.serving.http.event_loop import Lateness

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case


class Admission(Protocol):
    def __call__(self, path: bytes, headers: Headers, begins: float) -> tuple[int, Mapping[str, str], bytes] | None:
        """The answer to a POST that is refused before its body is read: status, headers and body; None: it is not.

        begins: when the time of its deadline begins, by time.monotonic().
        """
        ...


class LimitedConfig(uvicorn.Config):
    """uvicorn's configuration with what each Connection reads: `limits`, `refusal`, and how late all of them are."""

    def __init__(self, app: Any, limits: ServeConfig, refusal: Admission) -> None:
        self.limits, self.refusal, self.lateness = limits, refusal, Lateness()
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

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = self.config.limits
        self._timer: asyncio.TimerHandle | None = None
        self._reading, self._refused, self._header_bytes = False, False, 0
        self._answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(503, f"{self._limits.connections:,} connections are open; try again later")
        else:
            self._arm(self._limits.idle_seconds)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._answered is not None:  # uvicorn tells the last request of several only, and the others' answers raise
            self._answered.disconnected = True
            self._answered.message_event.set()
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
        self.scope["state"]["arrived"] = arrived = time.monotonic() - late
        # Its answer will wait as long again until it is written, so the engine has so much less time.
        self.scope["state"]["begins"] = begins = arrived - late
        self._refused = self._refuse_early(begins)
        if not self._refused:
            super().on_headers_complete()

    def _refuse_early(self, begins: float) -> bool:
        """Answers what is refused now, without a task, a route or its body: under overload most requests are."""
        is_first = self.cycle is None or self.cycle.response_complete  # and none before it is still answered
        if not is_first or self.parser.get_method() != b"POST" or not self._has_short_body():
            return False
        if (answer := self.config.refusal(self.url, self.headers, begins)) is None:
            return False
        self._write(*answer, close=not self.parser.should_keep_alive())
        return True

    def _has_short_body(self) -> bool:
        """One that is soon read past, for the next request on this connection."""
        lengths = [value for name, value in self.headers if name == b"content-length"]
        return len(lengths) == 1 and int(lengths[0]) <= self._limits.body_bytes

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading, self._header_bytes = False, 0
        self._disarm()
        if self._refused:
            self._refused = False
            self._arm(self._limits.idle_seconds)
        else:
            super().on_message_complete()

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
        self._write(status, {"content-type": "application/json"}, json.dumps({"error": message}).encode(), close=True)

    def _write(self, status: int, headers: Mapping[str, str], body: bytes, *, close: bool) -> None:
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()] + ["connection: close\r\n"] * close
        head = f"{''.join(lines)}content-length: {len(body)}\r\n\r\n".encode()
        self.transport.write(STATUS_LINE[status] + head + body)
        if close:
            self.transport.close()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        # The answer to this request, or an earlier one, may be on its way; nothing else is written into it.
        in_body = self._header_bytes < 0
        begun = self.cycle is not None and (
            self.cycle.response_started if in_body else not self.cycle.response_complete
        )
        if self._reading and not begun and not self._refused:
            self._refuse(408, f"the request did not end within {self._limits.read_seconds:g} seconds")
        else:
            self.transport.abort()

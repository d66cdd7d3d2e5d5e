"""An inference over HTTP, from the parser's callbacks to the socket: no task, no route and one write a request.

That is most of what a request of a small model costs a server; everything else goes through ASGI.
"""

import asyncio
import json
import re
import time
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.flow_control import FlowControl

from gr.serving.batch_queue import Overloaded
from gr.serving.engine import Answer
from gr.serving.http.open_inference import JSON_LENGTH, InferRequest, read_request, write_response
from gr.serving.http.served import REQUEST_ID, Served, error_of, id_of
from gr.serving.servable import RequestError

_JSON_LENGTH, _REQUEST_ID = JSON_LENGTH.lower().encode(), REQUEST_ID.lower().encode()
_NUMBER = re.compile(rb"[0-9]{1,18}")
_LONG_BODY = 1 << 16  # bytes; above, a body is read in a thread, so that other requests are not kept waiting


class Client(Protocol):
    """The connection of a request, as it is used here."""

    flow: FlowControl
    loop: asyncio.AbstractEventLoop

    def write(self, status: int, headers: dict[str, str], body: bytes, *, close: bool) -> None:
        """Writes a whole answer. close: the connection ends with it."""
        ...

    def proceed(self) -> None:
        """Tells a client that waits for it to send the body."""
        ...

    def answered(self) -> None:
        """An answer has been written; the next request of the connection may begin."""
        ...


class Inference:
    """One request. `start` it when none before it is unanswered; its body comes by `add` and `end`, also before that.

    It is answered where uvicorn expects one of its own cycles, and is the promise that the engine gives its answer to.
    """

    message_event = asyncio.Event()  # nobody waits for it; uvicorn sets it

    def __init__(
        self, client: Client, served: Served, path: tuple[str, str | None], headers: list[tuple[bytes, bytes]]
    ) -> None:
        """path: of Served.infer_path. headers: names in lower case."""
        self._client, self._served, (self._model, self._version) = client, served, path
        self._headers = dict(headers)
        self.keep_alive, self.expects_continue = True, False
        self.arrived = self.begins = 0.0
        self.response_started = self.response_complete = self.disconnected = False
        self._started = self._ended = False
        self._body: list[bytes] = []
        self._held = 0  # bytes of the body that count among those of all requests
        self._line: dict[str, Any] = {}
        self._asked: InferRequest | None = None
        self._id = id_of(self._headers.get(_REQUEST_ID, b"").decode("latin-1"))

    def start(self) -> None:
        """Answers at once what can be refused without the body: under overload that are most requests."""
        self._started = True
        try:
            self._verb = verb = self._served.verb(self._model, self._version)
            length, most = self._headers.get(b"content-length"), self._served.limits.body_bytes
            if length is None:
                raise HTTPException(411, "Content-Length: is missing", {"connection": "close"})
            if int(length) > most:  # digits, or the parser had refused them
                raise HTTPException(413, f"Content-Length: {int(length)} bytes, at most {most:,}")
            self._served.engine.require_room(verb, self.begins)
        except Exception as error:
            self._fail(error)
            return
        if self._ended:
            self._submit()
        elif self.expects_continue:
            self._client.proceed()

    def add(self, chunk: bytes) -> None:
        """A part of the body."""
        if self.response_started:
            return
        self._body.append(chunk)
        self._held += len(chunk)
        self._served.bodies += len(chunk)
        most = self._served.limits.bodies_bytes
        if self._served.bodies > most and self._started:
            self._fail(Overloaded(f"bodies of {most:,} bytes are being answered; try again later", 1.0))

    def end(self) -> None:
        """The body is whole."""
        self._ended = True
        if self._started and not self.response_started:
            self._submit()

    def leave(self) -> None:
        """The client is gone. What the engine has is still answered by it, and counted."""
        self.disconnected = True
        if self.response_started or (self._started and self._ended):
            return
        self._release()
        self.response_started = self.response_complete = True
        if self._started:
            self._record(499)  # nobody reads it; the log and the metrics do

    def _submit(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._line["bytes"] = len(body)
        if len(body) > _LONG_BODY:
            self._client.loop.run_in_executor(None, self._read, body)
        else:
            self._read(body)

    def _read(self, body: bytes) -> None:
        """Reads the body and asks the engine; in the loop's thread or another."""
        engine = self._served.engine
        # A request that would be run at once is run, however late the event loop was.
        begins = time.monotonic() if engine.is_idle(self._verb) else self.begins
        try:
            servable = engine.servable(self._verb)
            asked = read_request(body, self._json_bytes(len(body)), servable.inputs, servable.outputs)
            self._asked = asked
            engine.submit_to(self, self._verb, asked.columns, deadline_ms=asked.deadline_ms, arrived=begins)
        except Exception as error:
            self.set_exception(error)

    def _json_bytes(self, body_bytes: int) -> int:
        text = self._headers.get(_JSON_LENGTH)
        if text is None:
            return body_bytes
        if not _NUMBER.fullmatch(text) or int(text) > body_bytes:
            shown = text[:40].decode("latin-1")
            raise RequestError(JSON_LENGTH, f"is {shown!r}, expected a number of bytes up to the body's {body_bytes:,}")
        return int(text)

    def set_running_or_notify_cancel(self) -> bool:
        return True

    def cancelled(self) -> bool:
        return False

    def set_result(self, answer: Answer) -> None:
        """Called by any thread."""
        self._served.answers.add(self._client.loop, self._succeed, answer)

    def set_exception(self, error: BaseException) -> None:
        """Called by any thread."""
        self._served.answers.add(self._client.loop, self._fail, error)

    def _succeed(self, answer: Answer) -> None:
        asked, outputs = self._asked, self._served.engine.servable(self._verb).outputs
        assert asked is not None, "it was read before it was answered"
        self._line |= {"model": self._model, "version": answer.version}
        self._line |= {
            "queue_ms": round(1e3 * answer.queue_seconds, 3),
            "run_ms": round(1e3 * answer.run_seconds, 3),
        }
        head = {"model_name": self._model, "model_version": answer.version}
        if asked.id is not None:
            head["id"] = asked.id
        try:
            content, json_length = write_response(head, answer.outputs, outputs, asked.outputs)
        except Exception as error:
            self._fail(error)
            return
        if json_length is None:
            headers = {"content-type": "application/json"}
        else:
            headers = {"content-type": "application/octet-stream", JSON_LENGTH: str(json_length)}
        self._answer(200, headers, content)

    def _fail(self, error: BaseException) -> None:
        status, message, headers = error_of(error, self._id)
        self._answer(status, {"content-type": "application/json", **headers}, json.dumps({"error": message}).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._release()
        self._record(status)
        self.response_started = True
        headers[REQUEST_ID] = self._id
        if self._client.flow.write_paused and not self.disconnected:
            self._waiting = self._client.loop.create_task(self._write_later(status, headers, body))
        else:
            self._write(status, headers, body)

    async def _write_later(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Where the client has not taken the answers before."""
        await self._client.flow.drain()
        self._write(status, headers, body)

    def _write(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.response_complete = True
        if not self.disconnected:
            close = not self.keep_alive or headers.pop("connection", None) == "close"
            self._client.write(status, headers, body, close=close)
            self._client.answered()

    def _record(self, status: int) -> None:
        self._served.record("infer", self._id, status, time.monotonic() - self.arrived, self._line)

    def _release(self) -> None:
        """Gives up the body and its place under the limit of all bodies together."""
        self._body = []
        self._served.bodies -= self._held
        self._held = 0

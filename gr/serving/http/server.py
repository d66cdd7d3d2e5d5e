"""The HTTP server: Open Inference Protocol, health and metrics in front of an engine. See docs/serving.md."""

import asyncio
import gc
import json
import math
import os
import random
import re
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gr import __version__
from gr.config.serving import ServeConfig
from gr.dist import keep_freed_memory
from gr.errors import ServingError
from gr.logging import get_logger
from gr.serving.batch_queue import Overloaded
from gr.serving.engine import Answer, Engine
from gr.serving.http.connection import Headers, LimitedConfig
from gr.serving.http.event_loop import Answers
from gr.serving.http.metrics_text import CONTENT_TYPE, metrics_text
from gr.serving.http.open_inference import JSON_LENGTH, InferRequest, read_request, write_response
from gr.serving.servable import RequestError, Unavailable

log = get_logger(__name__)
REQUEST_ID = "X-Request-ID"
_REQUEST_ID = REQUEST_ID.lower().encode()
_PLAIN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_OWN_FILES = 256  # of the process beside connections: libraries, packages, logs
_LONG_BODY = 1 << 16  # bytes; above, a body is read in a thread, so that other requests are not kept waiting


@dataclass
class Served:
    """The state that all routes share. name: of the model; one verb is the model NAME, several are NAME.VERB each.

    write_access: takes the line of a request. bodies: bytes of bodies that are being read or answered.
    """

    engine: Engine
    name: str
    limits: ServeConfig
    write_access: Callable[[str], None] | None = None
    bodies: int = 0
    responses: Counter[int] = field(default_factory=Counter)
    answers: Answers = field(default_factory=Answers)

    @property
    def models(self) -> dict[str, str]:
        """Model -> verb."""
        verbs = self.engine.verbs
        return {self.name: verbs[0]} if len(verbs) == 1 else {f"{self.name}.{verb}": verb for verb in verbs}

    @cached_property
    def verbs(self) -> dict[bytes, str]:
        """Path of a POST, without a version -> verb."""
        return {f"/v2/models/{model}/infer".encode(): verb for model, verb in self.models.items()}

    def refusal(self, path: bytes, headers: Headers, begins: float) -> tuple[int, dict[str, str], bytes] | None:
        """The answer to a POST for which there is no room, before anything else is spent on it; None: there is room."""
        if (verb := self.verbs.get(path)) is None:
            return None
        try:
            self.engine.require_room(verb, begins)
        except Unavailable as error:
            given = next((value for name, value in headers if name == _REQUEST_ID), b"").decode("latin-1")
            status, message, headers_of_error = _error(error, request_id := id_of(given))
            self.record("infer", request_id, status, time.monotonic() - begins, {})
            head = {"content-type": "application/json", **headers_of_error, REQUEST_ID: request_id}
            return status, head, json.dumps({"error": message}).encode()
        return None

    def record(self, route: str, request_id: str, status: int, seconds: float, line: Mapping[str, Any]) -> None:
        """Counts an answer, and writes its line into the access log."""
        self.responses[status] += 1
        if self.write_access is not None:
            head = {"time": round(time.time(), 3), "request": request_id, "route": route, "status": status}
            self.write_access(json.dumps({**head, "ms": round(1e3 * seconds, 3), **line}))

    def verb(self, request: Request) -> str:
        """The verb of the model that the path names. Raises HTTPException 404."""
        model, version = request.path_params["model"], request.path_params.get("version")
        if model not in self.models:
            raise HTTPException(404, f"there is no model {model[:100]!r}; models: {', '.join(self.models)}")
        current = self.engine.version.name
        if version not in (None, current):
            raise HTTPException(404, f"version {version[:100]!r} of {model} is not served; {current} is")
        return self.models[model]


def id_of(given: str) -> str:
    """The id of a request: the client's, where it has one that a log can take."""
    return given if given and _PLAIN_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def application(served: Served) -> ASGIApp:
    """The ASGI application. Every answer but that of /metrics is JSON, errors are {"error": message}."""
    routed, infer = _routed(served), _logged(served, _infer)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or scope["raw_path"] not in served.verbs:
            await routed(scope, receive, send)
        else:  # what nearly all requests are passes by routes and middleware
            scope["path_params"] = {"model": scope["path"].split("/")[3]}
            response = await infer(Request(scope, receive))
            await response(scope, receive, send)

    return answer


def _routed(served: Served) -> Starlette:
    model = "/v2/models/{model}"
    versioned = model + "/versions/{version}"
    answers: list[tuple[str, str, Callable]] = [
        ("/v2", "GET", _server),
        ("/v2/health/live", "GET", _live),
        ("/v2/health/ready", "GET", _ready),
        ("/metrics", "GET", _metrics),
        *((path, "GET", _model) for path in (model, versioned)),
        *((f"{path}/ready", "GET", _model_ready) for path in (model, versioned)),
        *((f"{path}/infer", "POST", _infer) for path in (model, versioned)),
    ]
    routes = [Route(path, _logged(served, answer), methods=[method]) for path, method, answer in answers]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _unrouted(served)})
    app.router.redirect_slashes = False
    return app


def _logged(served: Served, answer: Callable) -> Callable:
    """`answer` with a request id, its errors as answers, and a line of the access log, without data of the user."""

    async def endpoint(request: Request) -> Response:
        request_id = id_of(request.headers.get(REQUEST_ID, ""))
        line: dict[str, Any] = {}
        try:
            response = await answer(served, request, line)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; the log and the metrics do
        except Exception as error:
            status, message, headers = _error(error, request_id)
            response = JSONResponse({"error": message}, status, headers)
        response.headers[REQUEST_ID] = request_id
        seconds = time.monotonic() - request.state.arrived
        served.record(answer.__name__.lstrip("_"), request_id, response.status_code, seconds, line)
        return response

    return endpoint


def _error(error: Exception, request_id: str) -> tuple[int, str, dict[str, str]]:
    """Status, message and headers of the answer to a request that failed."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, dict(error.headers or {})
    elif isinstance(error, RequestError):
        status, message = 400, str(error)
    elif isinstance(error, Unavailable):
        status, message = 503, str(error)
        if isinstance(error, Overloaded):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    else:
        log.error("request %s failed", request_id, exc_info=error)
        status, message = 500, f"the server failed on request {request_id}; its log says why"
    return status, message, headers


def _unrouted(served: Served) -> Callable:
    """The answer where no route is: to an unknown path, or to a method that a path does not have."""

    async def handler(request: Request, error: HTTPException) -> Response:
        async def unrouted(*_: object) -> Response:
            path = f"{request.method[:20]} {request.url.path[:100]}"
            raise HTTPException(error.status_code, f"{path}: {error.detail.lower()}", error.headers)

        return await _logged(served, unrouted)(request)

    return handler


async def _server(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return JSONResponse({"name": "gr", "version": __version__, "extensions": ["binary_tensor_data", "model_versions"]})


async def _live(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return JSONResponse({"live": True})


async def _ready(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return JSONResponse({"ready": True}) if served.engine.ready else JSONResponse({"ready": False}, 503)


async def _metrics(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return Response(metrics_text(served.engine, served.responses, served.bodies), media_type=CONTENT_TYPE)


async def _model(served: Served, request: Request, line: dict[str, Any]) -> Response:
    servable = served.engine.servable(served.verb(request))
    tensors = {
        side: [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]
        for side, specs in (("inputs", servable.inputs), ("outputs", servable.outputs))
    }
    head = {"name": request.path_params["model"], "versions": [served.engine.version.name], "platform": "gr"}
    return JSONResponse({**head, **tensors})


async def _model_ready(served: Served, request: Request, line: dict[str, Any]) -> Response:
    served.verb(request)
    ready = served.engine.ready
    return JSONResponse({"name": request.path_params["model"], "ready": ready}, 200 if ready else 503)


async def _infer(served: Served, request: Request, line: dict[str, Any]) -> Response:
    verb = served.verb(request)
    # A request that would be run at once is run, however late the event loop was.
    begins = time.monotonic() if served.engine.is_idle(verb) else request.state.begins
    with _Body(served) as body:
        await body.read(request)
        line["bytes"] = len(body.data)
        json_bytes = _json_bytes(request, len(body.data))
        if len(body.data) > _LONG_BODY:
            asked, future = await asyncio.to_thread(_submit, served.engine, verb, body.data, json_bytes, begins)
        else:
            asked, future = _submit(served.engine, verb, body.data, json_bytes, begins)
        answer = await served.answers.of(future)
    line |= {"model": request.path_params["model"], "version": answer.version}
    line |= {"queue_ms": round(1e3 * answer.queue_seconds, 3), "run_ms": round(1e3 * answer.run_seconds, 3)}
    head = {"model_name": request.path_params["model"], "model_version": answer.version}
    if asked.id is not None:
        head["id"] = asked.id
    content, json_length = write_response(head, answer.outputs, served.engine.servable(verb).outputs, asked.outputs)
    if json_length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={JSON_LENGTH: str(json_length)})


def _submit(
    engine: Engine, verb: str, body: bytes, json_bytes: int, begins: float
) -> "tuple[InferRequest, Future[Answer]]":
    servable = engine.servable(verb)
    asked = read_request(body, json_bytes, servable.inputs, servable.outputs)
    return asked, engine.submit(verb, asked.columns, deadline_ms=asked.deadline_ms, arrived=begins)


def _json_bytes(request: Request, body_bytes: int) -> int:
    text = request.headers.get(JSON_LENGTH)
    if text is None:
        return body_bytes
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) > body_bytes:
        raise RequestError(JSON_LENGTH, f"is {text[:40]!r}, expected a number of bytes up to the body's {body_bytes:,}")
    return int(text)


class _Body:
    """The body of a request, and its place under the limit of all bodies together until the request is answered."""

    def __init__(self, served: Served) -> None:
        self._served, self._held = served, 0
        self.data = b""

    async def read(self, request: Request) -> None:
        """Raises HTTPException: 411 without a length, 413 for a long body, 503 where all bodies are too much."""
        limits, length = self._served.limits, request.headers.get("content-length")
        if length is None:
            raise HTTPException(411, "Content-Length: is missing", {"connection": "close"})
        if int(length) > limits.body_bytes:  # digits, or the parser had refused them
            raise HTTPException(413, f"Content-Length: {length} bytes, at most {limits.body_bytes:,}")
        chunks = []
        async for chunk in request.stream():
            self._held += len(chunk)
            self._served.bodies += len(chunk)
            if self._served.bodies > limits.bodies_bytes:
                raise Overloaded(f"bodies of {limits.bodies_bytes:,} bytes are being answered; try again later", 1.0)
            chunks.append(chunk)
        self.data = b"".join(chunks)

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, *_: object) -> None:
        self._served.bodies -= self._held


def serve(served: Served, listener: socket.socket) -> None:
    """Answers until SIGTERM or SIGINT; then takes no connection any more, and answers what it has."""
    log.info("%s", describe(served, listener))
    server = uvicorn.Server(LimitedConfig(application(served), served.limits, served.refusal))
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is answered, for handlers before
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # what libraries and the model hold is never garbage, and to look through it takes a tenth of a second
    server.run(sockets=[listener])


def describe(served: Served, listener: socket.socket) -> str:
    """The line that says where what is served."""
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    version = served.engine.version
    return f"{', '.join(served.models)} of {version.kind} version {version.name} at {address}/v2"


def listen(limits: ServeConfig) -> socket.socket:
    """A listening socket, and files for all connections. Raises ServingError where either is not to be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.connections + _OWN_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ServingError(
            f"connections={limits.connections}: this process may have {hard:,} files open, and needs {needed:,}; "
            f"allow more (ulimit -n), or set connections={max(1, hard - _OWN_FILES)}"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    try:
        family = socket.getaddrinfo(limits.host, limits.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((limits.host, limits.port), family=family, backlog=min(limits.connections, 65535))
    except OSError as error:
        address = f"{limits.host}:{limits.port}"
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ServingError(f"cannot listen on {address}: {reason}; choose another port or host") from None

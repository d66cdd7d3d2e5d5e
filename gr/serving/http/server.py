"""The HTTP server: Open Inference Protocol, health and metrics in front of an engine. See docs/serving.md."""

import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gr import __version__
from gr.config.serving import ServeConfig
from gr.errors import ServingError
from gr.logging import get_logger
from gr.serving.engine import settle_process
from gr.serving.http.connection import LimitedConfig
from gr.serving.http.metrics_text import CONTENT_TYPE, metrics_text
from gr.serving.http.served import REQUEST_ID, Served, error_of, id_of

log = get_logger(__name__)
_OWN_FILES = 256  # of the process beside connections: libraries, packages, logs


def application(served: Served) -> Starlette:
    """All but inference, which Connection answers. Answers are JSON but that of /metrics, errors {"error": message}."""
    model = "/v2/models/{model}"
    versioned = model + "/versions/{version}"
    answers: list[tuple[str, Callable]] = [
        ("/v2", _server),
        ("/v2/health/live", _live),
        ("/v2/health/ready", _ready),
        ("/metrics", _metrics),
        *((path, _model) for path in (model, versioned)),
        *((f"{path}/ready", _model_ready) for path in (model, versioned)),
    ]
    routes = [Route(path, _logged(served, answer), methods=["GET"]) for path, answer in answers]
    not_post = ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"]
    routes += [Route(f"{path}/infer", _logged(served, _only_post), methods=not_post) for path in (model, versioned)]
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
        except Exception as error:
            status, message, headers = error_of(error, request_id)
            response = JSONResponse({"error": message}, status, headers)
        response.headers[REQUEST_ID] = request_id
        seconds = time.monotonic() - request.state.arrived
        served.record(answer.__name__.lstrip("_"), request_id, response.status_code, seconds, line)
        return response

    return endpoint


def _unrouted(served: Served) -> Callable:
    """The answer where no route is: to an unknown path, or to a method that a path does not have."""

    async def handler(request: Request, error: HTTPException) -> Response:
        async def unrouted(*_: object) -> Response:
            path = f"{request.method[:20]} {request.url.path[:100]}"
            raise HTTPException(error.status_code, f"{path}: {error.detail.lower()}", error.headers)

        return await _logged(served, unrouted)(request)

    return handler


def _named(request: Request) -> tuple[str, str | None]:
    """The model and the version, where there is one, that the path names."""
    return request.path_params["model"], request.path_params.get("version")


async def _server(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return JSONResponse({"name": "gr", "version": __version__, "extensions": ["binary_tensor_data", "model_versions"]})


async def _live(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return JSONResponse({"live": True})


async def _ready(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return JSONResponse({"ready": True}) if served.engine.ready else JSONResponse({"ready": False}, 503)


async def _metrics(served: Served, request: Request, line: dict[str, Any]) -> Response:
    return Response(metrics_text(served.engine, served.responses, served.bodies), media_type=CONTENT_TYPE)


async def _model(served: Served, request: Request, line: dict[str, Any]) -> Response:
    servable = served.engine.servable(served.verb(*_named(request)))
    tensors = {
        side: [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]
        for side, specs in (("inputs", servable.inputs), ("outputs", servable.outputs))
    }
    head = {"name": request.path_params["model"], "versions": [served.engine.version.name], "platform": "gr"}
    return JSONResponse({**head, **tensors})


async def _model_ready(served: Served, request: Request, line: dict[str, Any]) -> Response:
    served.verb(*_named(request))
    ready = served.engine.ready
    return JSONResponse({"name": request.path_params["model"], "ready": ready}, 200 if ready else 503)


async def _only_post(served: Served, request: Request, line: dict[str, Any]) -> Response:
    path = f"{request.method[:20]} {request.url.path[:100]}"
    raise HTTPException(405, f"{path}: method not allowed, inference is a POST", {"Allow": "POST"})


def serve(served: Served, listener: socket.socket) -> None:
    """Answers until SIGTERM or SIGINT; then takes no connection any more, and answers what it has."""
    log.info("%s", describe(served, listener))
    server = uvicorn.Server(LimitedConfig(application(served), served))
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is answered, for handlers before
    settle_process()
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

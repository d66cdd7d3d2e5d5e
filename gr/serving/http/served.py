"""What all requests to a server share: the engine, its limits, its counters, and how a request is named and refused."""

import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from starlette.exceptions import HTTPException

from gr.config.serving import ServeConfig
from gr.logging import get_logger
from gr.serving.batch_queue import Overloaded
from gr.serving.engine import Engine
from gr.serving.http.event_loop import Answers
from gr.serving.servable import RequestError, Unavailable

log = get_logger(__name__)
REQUEST_ID = "X-Request-ID"
_PLAIN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_INFER = re.compile(rb"/v2/models/([^/?]+)(?:/versions/([^/?]+))?/infer(?:\?.*)?", re.DOTALL)


@dataclass
class Served:
    """name: of the model; one verb is the model NAME, several are NAME.VERB each.

    write_access: takes the line of a request. bodies: bytes of bodies that are being read or answered.
    """

    engine: Engine
    name: str
    limits: ServeConfig
    write_access: Callable[[str], None] | None = None
    bodies: int = 0
    responses: Counter[int] = field(default_factory=Counter)
    answers: Answers = field(default_factory=Answers)

    @cached_property
    def models(self) -> dict[str, str]:
        """Model -> verb."""
        verbs = self.engine.verbs
        return {self.name: verbs[0]} if len(verbs) == 1 else {f"{self.name}.{verb}": verb for verb in verbs}

    @cached_property
    def _paths(self) -> dict[bytes, tuple[str, str | None]]:
        """Of the paths that nearly all requests have, what `infer_path` returns."""
        return {f"/v2/models/{model}/infer".encode(): (model, None) for model in self.models}

    def infer_path(self, url: bytes) -> tuple[str, str | None] | None:
        """The model and the version, where there is one, of the URL of an inference; None for any other."""
        if (usual := self._paths.get(url)) is not None:
            return usual
        if (match := _INFER.fullmatch(url)) is None:
            return None
        model, version = (None if part is None else unquote(part.decode("latin-1")) for part in match.groups())
        assert model is not None, "the pattern has it"
        return model, version

    def verb(self, model: str, version: str | None) -> str:
        """The verb of the model that a path names. Raises HTTPException 404."""
        if (verb := self.models.get(model)) is None:
            raise HTTPException(404, f"there is no model {model[:100]!r}; models: {', '.join(self.models)}")
        if version not in (None, current := self.engine.version.name):
            raise HTTPException(404, f"version {version[:100]!r} of {model} is not served; {current} is")
        return verb

    def record(self, route: str, request_id: str, status: int, seconds: float, line: Mapping[str, Any]) -> None:
        """Counts an answer, and writes its line into the access log."""
        self.responses[status] += 1
        if self.write_access is not None:
            head = {"time": round(time.time(), 3), "request": request_id, "route": route, "status": status}
            self.write_access(json.dumps({**head, "ms": round(1e3 * seconds, 3), **line}))


def id_of(given: str) -> str:
    """The id of a request: the client's, where it has one that a log can take."""
    return given if given and _PLAIN_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def error_of(error: BaseException, request_id: str) -> tuple[int, str, dict[str, str]]:
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

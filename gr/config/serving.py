"""Configuration of `gr serve`: the limits of the engine, and of the HTTP server in front of it."""

from typing import Annotated

from pydantic import Field

from gr.config.base import Count, PositiveFloat, Section

Port = Annotated[int, Field(ge=0, le=65535)]


class EngineConfig(Section):
    """Limits of the engine. A request has `rows`: examples of a click model, candidates of a ranking model."""

    batch_rows: Annotated[Count, Field(description="rows of several requests in one batch, at most")] = 4096
    request_rows: Annotated[Count, Field(description="rows of one request at most; more are answered 400")] = 16384
    queue_rows: Annotated[Count, Field(description="rows that wait at most; more are refused at once")] = 65536
    deadline_ms: Annotated[PositiveFloat, Field(description="of a request that names none; the longest")] = 100.0
    workers: Annotated[Count, Field(description="threads that answer, for each verb")] = 1
    torch_threads: Annotated[Count, Field(description="threads of torch inside each worker")] = 1


class ServeConfig(EngineConfig):
    """Limits of the HTTP server: sizes in bytes, times in seconds."""

    host: Annotated[str, Field(min_length=1, description="to listen on; by default only for this machine")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, Field(description="0: any that is free")] = 8000
    connections: Annotated[Count, Field(description="open at most; more are closed at once")] = 10240
    header_bytes: Annotated[Count, Field(description="of the request line and headers together")] = 16384
    body_bytes: Annotated[Count, Field(description="of one request's body")] = 8 * 2**20
    bodies_bytes: Annotated[Count, Field(description="of all bodies that are being read or answered")] = 256 * 2**20
    read_seconds: Annotated[PositiveFloat, Field(description="from the first byte of a request to its last")] = 10.0
    idle_seconds: Annotated[PositiveFloat, Field(description="a connection may wait for its next request")] = 60.0
    drain_seconds: Annotated[Count, Field(description="requests have to be answered after SIGTERM")] = 10
    watch_seconds: Annotated[PositiveFloat, Field(description="between looks at current.json, with --watch")] = 1.0

"""The configuration of `gr serve`: the limits of the engine, and of the HTTP server in front of it. No torch."""

from collections.abc import Sequence

from pydantic import Field

from gr.config.base import Count, PositiveFloat, Section


class EngineConfig(Section):
    """Limits of the engine. A request has rows: examples of a click model, candidates of a ranking model."""

    batch_rows: Count = Field(4096, description="Rows of several requests in one batch, at most.")
    request_rows: Count = Field(16384, description="Rows of one request at most; more are refused, which is HTTP 400.")
    queue_rows: Count = Field(65536, description="Rows that wait at most; more are refused at once, which is HTTP 503.")
    deadline_ms: PositiveFloat = Field(
        100.0,
        description="From the arrival of a request to its answer; a request may name less. What cannot be answered in "
        "time is refused, which is HTTP 503.",
    )
    workers: Count = Field(1, description="Threads that run batches, for each verb.")
    torch_threads: Count = Field(1, description="Threads of torch inside each worker.")


class ServeConfig(EngineConfig):
    """Limits of the HTTP server; each value may be given on the command line of `gr serve`, as port=8001."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; by default only this machine's.")
    port: int = Field(8000, ge=0, le=65535, description="0: any that is free.")
    connections: Count = Field(10240, description="Open connections at most; more are answered 503 and closed.")
    header_bytes: Count = Field(16384, description="Of the request line and all headers of a request, at most.")
    body_bytes: Count = Field(8 * 2**20, description="Of the body of a request, at most.")
    bodies_bytes: Count = Field(256 * 2**20, description="Of all bodies that are being read or answered, at most.")
    read_seconds: PositiveFloat = Field(10.0, description="From the first byte of a request to its last, at most.")
    idle_seconds: PositiveFloat = Field(60.0, description="A connection may wait for its next request.")
    drain_seconds: Count = Field(10, description="After SIGTERM, for the answers to what was accepted.")
    watch_seconds: PositiveFloat = Field(1.0, description="Between looks at current.json, with --watch.")


def load_serve_config(overrides: Sequence[str]) -> ServeConfig:
    """The configuration of a command line. Raises ConfigError with every fault."""
    # Not needed by who takes the limits as they are.
    from gr.config.load import load_section
    from gr.config.yaml import Node

    return load_section(ServeConfig, "gr serve", overrides, given=Node({}, "gr serve"))

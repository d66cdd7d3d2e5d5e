"""A server of a toy version in a thread of the test's process, and a client that sends raw bytes."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

import uvicorn

from gr.config.serving import ServeConfig
from gr.serving import Engine
from gr.serving.http.connection import LimitedConfig
from gr.serving.http.served import Served
from gr.serving.http.server import application, listen
from gr.serving.servable import ServedVersion

Address = tuple[str, int]


@contextmanager
def running(
    version: ServedVersion, lines: list[str] | None = None, **limits: float
) -> Iterator[tuple[Served, Address]]:
    """limits: of ServeConfig. lines: gets the access log."""
    config = ServeConfig(port=0, connections=200, deadline_ms=10_000, **limits)
    with Engine(version, config) as engine, listen(config) as listener:
        served = Served(engine, "toy", config, None if lines is None else lines.append)
        server = uvicorn.Server(LimitedConfig(application(served), served))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield served, listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def exchange(address: Address, request: bytes, timeout: float = 10.0) -> tuple[int, dict[str, str], bytes]:
    """Sends `request` and reads one answer: status (0: closed without one), headers in lower case, body."""
    with socket.create_connection(address, timeout) as connection:
        connection.sendall(request)
        return answer_of(connection)


def answer_of(connection: socket.socket, file: BinaryIO | None = None) -> tuple[int, dict[str, str], bytes]:
    """file: of the connection, where answers follow each other."""
    with nullcontext(file) if file is not None else connection.makefile("rb") as file:
        status = file.readline()
        if not status:
            return 0, {}, b""
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return int(status.split()[1]), headers, file.read(int(headers["content-length"]))


def post(body: bytes, path: str = "/v2/models/toy/infer", length: int | None = None, **headers: str) -> bytes:
    """The bytes of a POST. length: of Content-Length, where it is not the body's."""
    length = len(body) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

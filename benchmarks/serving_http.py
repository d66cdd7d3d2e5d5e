"""What a request costs a server over HTTP, in processor time: a package, each request alone, torchrec, and a refusal.

    OMP_NUM_THREADS=1 python -m benchmarks.serving_http PACKAGE --checkpoint RUN --input FILE [--connections 64]

Connections ask for --seconds as fast as they are answered, each the next request of FILE when it has its answer, so
every core that the server gets is used. Processor time depends on other work much less than rates do; the number that
one core can answer a second is its inverse, where no other work is on that core.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import uvloop

from gr.config.serving import ServeConfig
from gr.serving import TensorSpec
from gr.serving.load.eager import EagerClick
from gr.serving.load.load_test import Columns, read_requests
from gr.serving.load.server_process import MODEL, server
from gr.serving.load.targets import http_request
from gr.serving.package.version import Version
from gr.serving.servable import ServedVersion
from tests.support.toy_serving import ToyServable, ToyVersion


class Client(asyncio.Protocol):
    """One connection, which asks until `stop` seconds of time.monotonic(). statuses: counts answers."""

    transport: asyncio.Transport

    def __init__(self, requests: Sequence[bytes], statuses: Counter[int], stop: float) -> None:
        self._requests, self._statuses, self._stop = itertools.cycle(requests), statuses, stop
        self._received = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            return
        self._statuses[int(head[9:12])] += 1
        self._received = b""
        if time.monotonic() < self._stop:
            self.transport.write(next(self._requests))
        else:
            self.transport.close()


async def ask(address: tuple[str, int], requests: Sequence[bytes], connections: int, seconds: float) -> Counter[int]:
    statuses: Counter[int] = Counter()
    stop = time.monotonic() + seconds
    loop = asyncio.get_running_loop()
    clients = [
        await loop.create_connection(lambda: Client(requests, statuses, stop), *address) for _ in range(connections)
    ]
    while not all(transport.is_closing() for transport, _ in clients):
        await asyncio.sleep(0.05)
    return statuses


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    name: str,
    open_version: Callable[[], ServedVersion],
    inputs: Sequence[TensorSpec],
    requests: Sequence[Columns],
    options: argparse.Namespace,
    **limits: float,
) -> None:
    """Prints a row of the table."""
    given = ServeConfig(port=0, **limits)  # type: ignore[arg-type]
    with server(open_version, given) as address:
        (process,) = multiprocessing.active_children()
        sent = [http_request(address[0], MODEL, columns, inputs) for columns in requests]
        uvloop.run(ask(address, sent, options.connections, options.seconds / 4))  # to begin with
        before = processor_seconds(process.pid or 0)
        statuses = uvloop.run(ask(address, sent, options.connections, options.seconds))
        used = processor_seconds(process.pid or 0) - before
    answers = ", ".join(f"{count:,} of {status}" for status, count in sorted(statuses.items()))
    print(f"| {name} | {1e6 * used / statuses.total():.0f} | {answers} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    version = Version.open(options.package)
    inputs = version.verbs["score"].inputs
    requests = read_requests(options.input, inputs, options.rows)[:100]
    package, eager = partial(Version.open, options.package), partial(EagerClick.of, options.checkpoint, options.package)
    patient = {"deadline_ms": 1e7}
    print(f"{options.rows} rows a request, {options.connections} connections, load {os.getloadavg()[0]:.1f}")
    print("| | processor us a request | answers |\n|---|---|---|")
    measure("package, with its queue", package, inputs, requests, options, **patient)
    measure("package, each request alone", package, inputs, requests, options, batch_rows=1, **patient)
    measure("torchrec, each request alone", eager, inputs, requests, options, batch_rows=1, **patient)
    # A batch of this one takes half a second and no processor time, and the deadline is the shorter one.
    toy = [{"x": np.ones(options.rows, np.float32)}]
    slow = partial(ToyVersion, 1, fixed=0.5)
    measure("what is refused, nearly all", slow, ToyServable.inputs, toy, options, deadline_ms=100)


if __name__ == "__main__":
    main()

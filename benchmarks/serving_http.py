"""What a request costs a server over HTTP, in processor time: a package, each request alone, torchrec, and a refusal.

    OMP_NUM_THREADS=1 python -m benchmarks.serving_http PACKAGE --checkpoint RUN --input FILE [--connections 64]

Connections ask for --seconds as fast as they are answered, each the next request of FILE when it has its answer; the
servers take turns, --rounds times, and medians are shown. Processor time depends on other work much less than rates
do; the number that one core can answer a second is its inverse, where no other work is on that core.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

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


@dataclass
class Side:
    """A server that is measured, and what it is asked. microseconds: of processor time a request, by round."""

    name: str
    open_version: Callable[[], ServedVersion]
    inputs: Sequence[TensorSpec]
    columns: Sequence[Columns]
    limits: ServeConfig
    address: tuple[str, int] = ("", 0)
    process: int = 0
    microseconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def start(self, stack: ExitStack) -> None:
        others = {process.pid for process in multiprocessing.active_children()}
        self.address = stack.enter_context(server(self.open_version, self.limits))
        (self.process,) = {process.pid or 0 for process in multiprocessing.active_children()} - others

    def ask(self, connections: int, seconds: float) -> None:
        requests = [http_request(self.address[0], MODEL, each, self.inputs) for each in self.columns]
        before = processor_seconds(self.process)
        statuses = uvloop.run(ask(self.address, requests, connections, seconds))
        self.microseconds.append(1e6 * (processor_seconds(self.process) - before) / statuses.total())
        self.statuses += statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    version = Version.open(options.package)
    inputs = version.verbs["score"].inputs
    requests = read_requests(options.input, inputs, options.rows)[:100]
    package, eager = partial(Version.open, options.package), partial(EagerClick.of, options.checkpoint, options.package)
    limits = partial(ServeConfig, port=0, deadline_ms=1e7)
    # A batch of the last one takes half a second and no processor time, and the deadline is the shorter one.
    toy = [{"x": np.ones(options.rows, np.float32)}]
    sides = [
        Side("package, with its queue", package, inputs, requests, limits()),
        Side("package, each request alone", package, inputs, requests, limits(batch_rows=1)),
        Side("torchrec, each request alone", eager, inputs, requests, limits(batch_rows=1)),
        Side("refused", partial(ToyVersion, 1, fixed=0.5), ToyServable.inputs, toy, limits(deadline_ms=100)),
    ]
    with ExitStack() as stack:
        for side in sides:
            side.start(stack)
        for _ in range(1 + options.rounds):
            for side in sides:
                side.ask(options.connections, options.seconds)
    print(f"{options.rows} rows a request, {options.connections} connections, load {os.getloadavg()[0]:.1f}")
    print("| | processor us a request | in rounds | over the first, within a round | answers |\n|---|---|---|---|---|")
    for side in sides:
        measured = sorted(side.microseconds[1:])  # the first round is to begin with
        ratios = [own / first for own, first in zip(side.microseconds[1:], sides[0].microseconds[1:], strict=True)]
        answers = ", ".join(f"{count:,} of {status}" for status, count in sorted(side.statuses.items()))
        span = f"{measured[0]:.0f} to {measured[-1]:.0f}"
        print(f"| {side.name} | {median(measured):.0f} | {span} | {median(ratios):.1f} | {answers} |")


if __name__ == "__main__":
    main()

"""Hostile requests to a server: damaged bodies, headers and tensors, slow clients, idle connections.

    python -m benchmarks.fuzz_server HOST:PORT MODEL --cases 5000 --idle 10000 --pid PID

Requests are made from the model's own metadata, so any package can be asked. Each must be answered 4xx, in one line of
JSON that names the field that was made wrong; bytes damaged at random may also leave a request that is right.
"""

import argparse
import json
import re
import socket
import time
from collections import Counter
from dataclasses import dataclass
from random import Random

from benchmarks.hostile_requests import MUTATIONS, Draft, Tensor

Address = tuple[str, int]


@dataclass(frozen=True)
class Outcome:
    """fault: what was wrong with the answer; empty where it is as it has to be."""

    mutation: str
    status: int
    message: str
    fault: str


def attempt(address: Address, path: str, inputs: list[Tensor], seed: int) -> Outcome:
    """One mutated request. inputs: of the model's metadata."""
    right = draft(path, inputs, seed)
    name = list(MUTATIONS)[seed % len(MUTATIONS)]
    field = MUTATIONS[name](right)
    status, message = exchange(address, right.bytes())
    named = field is None or field in message
    refused = 400 <= status < 500
    if refused and not named:
        return Outcome(name, status, message, f"does not name {field!r}")
    fits = refused or (field is None and status == 200)
    return Outcome(name, status, message, "" if fits else f"is answered {status or 'not at all'}")


def draft(path: str, inputs: list[Tensor], seed: int) -> Draft:
    """A request that is right, with values at random."""
    random = Random(seed)
    tensors = [_right(tensor, random) for tensor in inputs]
    return Draft(random, path, tensors, {"inputs": tensors}, {})


def _right(tensor: Tensor, random: Random) -> Tensor:
    """A tensor as the metadata asks for, of two rows."""
    shape = [2 if size == -1 else size for size in tensor["shape"]]
    count = 1
    for size in shape:
        count *= size
    values = {
        **{"BYTES": lambda: f"v{random.randrange(99)}", "BOOL": lambda: random.random() < 0.5},
        **{"FP32": random.random, "FP64": random.random},
    }
    make = values.get(tensor["datatype"], lambda: random.randrange(9))
    return {
        "name": tensor["name"],
        "datatype": tensor["datatype"],
        "shape": shape,
        "data": [make() for _ in range(count)],
    }


def exchange(address: Address, request: bytes, timeout: float = 30.0) -> tuple[int, str]:
    """The status of one answer, 0 where there is none, and its error."""
    try:
        with socket.create_connection(address, timeout) as connection:
            connection.sendall(request)
            with connection.makefile("rb") as file:
                status = int(file.readline().split()[1])
                length = 0
                while line := file.readline().strip().lower():
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                return status, str(json.loads(file.read(length)).get("error", ""))
    except (OSError, IndexError, ValueError) as error:
        return 0, f"{type(error).__name__}: {error}"


def metadata(address: Address, model: str) -> list[Tensor]:
    """The inputs of a model."""
    with socket.create_connection(address, 30) as connection:
        connection.sendall(f"GET /v2/models/{model} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return json.loads(answer.partition(b"\r\n\r\n")[2])["inputs"]


def idle(address: Address, count: int, request: bytes) -> tuple[int, float]:
    """Opens `count` connections that say nothing or half a request, then asks: the status and its seconds."""
    connections = []
    try:
        for number in range(count):
            connections.append(socket.create_connection(address, 30))
            if number % 2:
                connections[-1].sendall(b"POST /v2/models/")
        started = time.perf_counter()
        status, _ = exchange(address, request)
        return status, time.perf_counter() - started
    finally:
        for connection in connections:
            connection.close()


def _resident(pid: int) -> float:
    """MiB."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.findall(r"VmRSS:\s+(\d+)", file.read())[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("model")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--idle", type=int, default=0)
    parser.add_argument("--pid", type=int, help="of the server, to read its memory")
    given = parser.parse_args()
    host, _, port = given.address.rpartition(":")
    address, path = (host, int(port)), f"/v2/models/{given.model}/infer"
    inputs = metadata(address, given.model)
    before = _resident(given.pid) if given.pid else 0.0
    outcomes = [attempt(address, path, inputs, seed) for seed in range(given.cases)]
    for status, count in sorted(Counter(outcome.status for outcome in outcomes).items()):
        print(f"answered {status}: {count:,}")
    bad = [outcome for outcome in outcomes if outcome.fault]
    for outcome in bad[:20]:
        print(f"BAD {outcome.mutation}: {outcome.fault}: {outcome.message[:200]}")
    print(f"{len(outcomes):,} requests, {len(bad)} bad")
    if given.pid:
        print(f"server: {before:,.0f} MiB before, {_resident(given.pid):,.0f} after")
    if given.idle:
        status, seconds = idle(address, given.idle, draft(path, inputs, 0).bytes())
        print(f"{given.idle:,} idle connections: a request is answered {status} in {1e3 * seconds:.1f} ms")
        if given.pid:
            print(f"server: {_resident(given.pid):,.0f} MiB")


if __name__ == "__main__":
    main()

"""Where the nodes of a job meet, and under which name each knows the place."""

import os
import re
import socket
import time
import zlib
from dataclasses import dataclass

from launch.outcome import CRASHED, NodeError
from launch.stop import Stop

PORTS = range(20000, 30000)  # below the ports that Linux hands out by itself (32768 and up)
_ENDPOINT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class Group:
    """The nodes of a job. rendezvous: host:port of the first node, None for a job of one node."""

    least: int
    most: int
    rendezvous: str | None
    job_id: str

    @property
    def elastic(self) -> bool:
        return self.least != self.most

    def next_port(self, job_id: str) -> "Group":
        """The same nodes, who meet under another id at the port after this one."""
        if self.rendezvous is None:
            return Group(1, 1, None, job_id)
        host, port = _split(self.rendezvous)
        return Group(self.least, self.most, f"{host}:{port + 1}", job_id)

    def first_is_here(self) -> bool:
        """Whether this is the first node; no node is while its name does not resolve."""
        try:
            return self.rendezvous is None or is_here(_split(self.rendezvous)[0])
        except OSError:
            return False

    def meeting_place(self) -> tuple[str, str | None]:
        """(endpoint for torchrun here, this node's address for the others, None for its own name).

        torch compares the host with this machine's name to find out who hosts the store, and misses a second network
        interface and an entry of /etc/hosts (127.0.1.1): the first node calls itself localhost.
        """
        if self.rendezvous is None:
            return "localhost:0", None
        host, port = _split(self.rendezvous)
        return (f"localhost:{port}", host.strip("[]")) if self.first_is_here() else (self.rendezvous, None)


def parse_group(nnodes: str, rendezvous: str, job_id: str) -> Group:
    """nnodes: N or MIN:MAX. rendezvous: HOST, HOST:PORT, or env:NAME for the host in a variable; [ADDRESS] for IPv6."""
    match = re.fullmatch(r"([1-9][0-9]*)(?::([1-9][0-9]*))?", nnodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise NodeError(f"--nnodes={nnodes}: give N, or MIN:MAX with 1 <= MIN <= MAX")
    if most == 1:
        return Group(1, 1, None, job_id)
    place = os.environ.get(rendezvous.removeprefix("env:"), "") if rendezvous.startswith("env:") else rendezvous
    if not place:
        raise NodeError(f"--rendezvous={rendezvous} names no host: give the first node's, as HOST or HOST:PORT")
    endpoint = _ENDPOINT.fullmatch(place)
    # The same on every node of a job, and another for another job on the same nodes.
    port = int(endpoint["port"] or PORTS[zlib.crc32(job_id.encode()) % len(PORTS)]) if endpoint else 0
    if endpoint is None or not 0 < port < 65535:
        raise NodeError(f"--rendezvous={place}: give HOST or HOST:PORT with 1 <= PORT <= 65534, IPv6 as [ADDRESS]:PORT")
    return Group(least, most, f"{endpoint['host']}:{port}", job_id)


def await_rendezvous(endpoint: str, seconds: float, stop: Stop) -> None:
    """Returns when the first node listens, at once if this is it, and when asked to stop. Raises NodeError after
    `seconds`.
    """
    host, port = _split(endpoint)
    deadline = time.monotonic() + seconds
    while not stop.asked:
        try:
            if is_here(host):
                return
            with socket.create_connection((host.strip("[]"), port), timeout=5):
                return
        except OSError as error:
            fault = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise NodeError(
                f"rendezvous {endpoint} does not answer ({fault}) after {seconds:.0f} s: is that node running, does "
                "its name resolve here, and do the nodes let each other through on that port?",
                outcome=CRASHED,
            )
        time.sleep(1)


def is_here(host: str) -> bool:
    """Whether an address of `host` is one of this machine's. Raises OSError if the name does not resolve."""
    found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
    return any(_has(family, str(where[0])) for family, _, _, _, where in found)


def _has(family: socket.AddressFamily, address: str) -> bool:
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _split(endpoint: str) -> tuple[str, int]:
    """Host, an IPv6 address in brackets, and port."""
    host, _, port = endpoint.rpartition(":")
    return host, int(port)

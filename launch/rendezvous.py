"""The rendezvous of the nodes of a job: its address, and the name under which each node reaches it."""

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
    """The nodes of a job, minimum to maximum. rendezvous: host:port of the first node, None for a job of one node."""

    min_nodes: int
    max_nodes: int
    rendezvous: str | None
    job_id: str

    @property
    def elastic(self) -> bool:
        return self.min_nodes != self.max_nodes

    def next_port(self, job_id: str) -> "Group":
        """The same nodes with another id, at the next port."""
        if self.rendezvous is None:
            return Group(1, 1, None, job_id)
        host, port = _split(self.rendezvous)
        return Group(self.min_nodes, self.max_nodes, f"{host}:{port + 1}", job_id)

    def first_is_here(self) -> bool:
        """True on the first node; False on all nodes while the name of the first one does not resolve."""
        try:
            return self.rendezvous is None or is_here(_split(self.rendezvous)[0])
        except OSError:
            return False

    def meeting_place(self) -> tuple[str, str | None]:
        """A pair: the endpoint for torchrun on this node, and the address of this node for the others.

        An address of None stands for the host name. torch compares the endpoint with the name of the machine to choose
        the node that hosts the store, and misses a second network interface and an entry of /etc/hosts (127.0.1.1), so
        the first node calls itself localhost.
        """
        if self.rendezvous is None:
            return "localhost:0", None
        host, port = _split(self.rendezvous)
        return (f"localhost:{port}", host.strip("[]")) if self.first_is_here() else (self.rendezvous, None)


def parse_group(nnodes: str, rendezvous: str, job_id: str) -> Group:
    """nnodes: N or MIN:MAX. rendezvous: HOST, HOST:PORT, or env:NAME for the host in a variable; [ADDRESS] for IPv6."""
    match = re.fullmatch(r"([1-9][0-9]*)(?::([1-9][0-9]*))?", nnodes)
    min_nodes, max_nodes = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if min_nodes > max_nodes:
        raise NodeError(f"--nnodes={nnodes}: give N, or MIN:MAX with 1 <= MIN <= MAX")
    if max_nodes == 1:
        return Group(1, 1, None, job_id)
    address = os.environ.get(rendezvous.removeprefix("env:"), "") if rendezvous.startswith("env:") else rendezvous
    if not address:
        raise NodeError(f"--rendezvous={rendezvous} names no host: give the first node's, as HOST or HOST:PORT")
    endpoint = _ENDPOINT.fullmatch(address)
    # Every node of a job computes the same port, and another job on the same nodes most likely another one.
    port = int(endpoint["port"] or PORTS[zlib.crc32(job_id.encode()) % len(PORTS)]) if endpoint else 0
    if endpoint is None or not 0 < port < 65535:
        raise NodeError(
            f"--rendezvous={address}: give HOST or HOST:PORT with 1 <= PORT <= 65534, IPv6 as [ADDRESS]:PORT"
        )
    return Group(min_nodes, max_nodes, f"{endpoint['host']}:{port}", job_id)


def await_rendezvous(endpoint: str, seconds: float, stop: Stop) -> None:
    """Waits until the first node listens; returns at once on that node, and after a request to stop.

    Raises NodeError after `seconds`.
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
    """True if an address of `host` belongs to this machine. Raises OSError if the name does not resolve."""
    addresses = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
    return any(_has(family, str(address[0])) for family, _, _, _, address in addresses)


def _has(family: socket.AddressFamily, address: str) -> bool:
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _split(endpoint: str) -> tuple[str, int]:
    """The host and the port; an IPv6 address stays in brackets."""
    host, _, port = endpoint.rpartition(":")
    return host, int(port)

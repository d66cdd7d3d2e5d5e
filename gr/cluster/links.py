"""Measurements of links for preflight: how fast all ranks exchange, and which host is slow."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from gr.cluster.calibrate import Work, all_reduce, all_to_all, median_seconds
from gr.dist import World

MESSAGE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 27}
REPEATS = 5


@dataclass(frozen=True)
class LinkRates:
    """Bytes/s that leave a rank; the slowest rank counts. pairs: by the indices of two neighbouring hosts."""

    all_to_all: float
    all_reduce: float
    pairs: dict[tuple[int, int], float]


def measure_links(world: World, device: torch.device) -> LinkRates:
    """The rates between all ranks; there are two or more, on hosts of equal size, and each calls this.

    device: holds the messages.
    """
    size = MESSAGE_BYTES[device.type]
    group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
    rates = []
    for collective in (all_to_all, all_reduce):
        work, sent = collective(group, device, size)
        rates.append(_slowest(world, sent / median_seconds(work, device, REPEATS, lambda: dist.barrier(group))))
    return LinkRates(rates[0], rates[1], _pairs(world, group, device, size))


def slow_hosts(links: LinkRates, bandwidth: float, hosts: int) -> list[int]:
    """Hosts whose every link is slower than `bandwidth`, in bytes/s; both of a slow pair where there are only two."""
    slow = {pair for pair, rate in links.pairs.items() if rate < bandwidth}
    return [host for host in range(hosts) if all(pair in slow for pair in links.pairs if host in pair)]


def _pairs(world: World, group: ProcessGroup, device: torch.device, size: int) -> dict[tuple[int, int], float]:
    """The rate of each host with the next one, in a ring. Each rank exchanges with its local rank on the other host."""
    hosts, host = world.size // world.local_size, world.rank // world.local_size
    rates = {}
    for first in range(hosts if hosts > 2 else hosts - 1):
        pair = first, (first + 1) % hosts
        rate = float("inf")
        if host in pair:
            other = pair[1 - pair.index(host)] * world.local_size + world.local_rank
            work = _exchange(group, device, size, other)
            rate = size / median_seconds(work, device, REPEATS, lambda: None)
        rates[pair] = _slowest(world, rate)
    return rates


def _exchange(group: ProcessGroup, device: torch.device, size: int, other: int) -> Work:
    sent, received = (torch.zeros(size // 4, device=device) for _ in range(2))

    def work(_: int) -> None:
        operations = [dist.P2POp(dist.isend, sent, other, group), dist.P2POp(dist.irecv, received, other, group)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return work


def _slowest(world: World, rate: float) -> float:
    return min(float(text) for text in world.gather_text(repr(rate)))

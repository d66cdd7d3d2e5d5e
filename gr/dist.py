"""Where a process stands among its peers: rank, world size, device, process group."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gr.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """One process of a run. `group` is the default process group; there always is one, also for one process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Sums of `values` over ranks, in float64. Every rank must call it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def all_gather_ints(self, values: list[int]) -> list[list[int]]:
        """`values` of every rank, in rank order. Every rank must call it with as many values."""
        if self.size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        out = mine.new_empty(self.size * len(values))
        dist.all_gather_single(out, mine)
        return out.view(self.size, -1).tolist()

    def all_gather_variable(self, values: Tensor) -> list[Tensor]:
        """1-D `values` of every rank, in rank order; their lengths may differ. Every rank must call it."""
        if self.size == 1:
            return [values]
        lengths = [length for (length,) in self.all_gather_ints([len(values)])]
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        out = padded.new_empty(self.size * len(padded))
        dist.all_gather_single(out, padded)
        return [row[:length] for row, length in zip(out.view(self.size, -1), lengths, strict=True)]

    def from_main(self, text: str) -> str:
        """The main rank's `text`, on every rank: for what one rank has to decide, such as what is on disk."""
        if self.size == 1:
            return text
        letters = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(text.encode())], device=self.device)
        dist.broadcast(length, src=0)
        if not self.is_main:
            letters = torch.empty(max(1, int(length)), dtype=torch.uint8, device=self.device)
        dist.broadcast(letters, src=0)
        return bytes(letters[: int(length)].tolist()).decode()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank. Every rank must call it."""
        return self.all_reduce_sum([float(here)])[0] > 0


def resolve_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The device of this process. Raises ConfigError when cuda is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here: set device=cpu, or run `gr doctor` for the remedy")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def use_cpu_well(world: World) -> None:
    """For the entry point of a process that trains on CPU: a rank takes its share of the cores it may use.

    OMP_NUM_THREADS decides where it is set, but for the 1 that torchrun sets by itself on any box.
    """
    if world.device.type == "cpu":
        torch.set_num_threads(cpu_threads(world.local_size, len(os.sched_getaffinity(0)), os.environ))


def cpu_threads(local_size: int, cores: int, environment: Mapping[str, str]) -> int:
    """Threads of one of `local_size` ranks on a machine with `cores`."""
    wanted = environment.get("OMP_NUM_THREADS", "")
    set_by_torchrun = wanted == "1" and "TORCHELASTIC_RUN_ID" in environment
    if wanted.isdecimal() and int(wanted) > 0 and not set_by_torchrun:
        return int(wanted)
    return max(1, cores // local_size)


@contextmanager
def world(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[World]:
    """Joins the process group that torchrun describes in the environment, or makes one of a single process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    chosen = resolve_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    store = None if size > 1 else dist.HashStore()
    # TorchRec reads the local world size from the environment and assumes 8 where it is missing.
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(local_size))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size, local_rank, local_size, chosen)
    finally:
        dist.destroy_process_group()

"""The place of a process among its peers: rank, world size, device, process group."""

import ctypes
import glob
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch import Tensor

from gr import watchdog
from gr.environment import whole_number
from gr.errors import ConfigError, TransientError
from gr.files import is_transient
from gr.logging import get_logger, log_once

TIMEOUT_SECONDS = 600.0  # the default time limit of a collective
CONNECT_SECONDS = 120.0
MOST_THREADS = 1024
Outcome = TypeVar("Outcome", bound=str | None)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # constants of malloc.h
log = get_logger(__name__)


@dataclass(frozen=True)
class World:
    """One process of a run. There always is a default process group, also for a single process.

    host_group: a gloo group for values that the host decides with, which need not wait for a GPU; None means the
    default group.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """The sums of `values` over ranks, in float64. Every rank must call it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def all_gather_ints(self, values: list[int]) -> list[list[int]]:
        """The values of every rank, in rank order. Every rank must call it, with the same number of values."""
        if self.size == 1:
            return [values]
        own = torch.tensor(values, dtype=torch.int64)
        out = own.new_empty(self.size * len(values))
        dist.all_gather_single(out, own, group=self.host_group)
        return out.view(self.size, -1).tolist()

    def all_gather_variable(self, values: Tensor) -> list[Tensor]:
        """The 1-D values of every rank, in rank order; their lengths may differ. Every rank must call it."""
        if self.size == 1:
            return [values]
        lengths = [length for (length,) in self.all_gather_ints([len(values)])]
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        out = padded.new_empty(self.size * len(padded))
        dist.all_gather_single(out, padded, group=self._group_of(values))
        return [row[:length] for row, length in zip(out.view(self.size, -1), lengths, strict=True)]

    def exchange_rows(self, rows_NF: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Sends the first send[0] rows to rank 0, the next send[1] to rank 1, ..., and returns the rows received.

        receive: the number of rows from each rank; they are returned in rank order. Every rank must call it.
        """
        out = rows_NF.new_empty(sum(receive), rows_NF.shape[1])
        if rows_NF.shape[1]:
            dist.all_to_all_single(out, rows_NF, receive, send, group=self._group_of(rows_NF))
        return out

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self.host_group if tensor.device.type == "cpu" else None

    def from_main(self, text: str) -> str:
        """The text of the main rank, on every rank: for decisions of one rank, such as on the state of a disk."""
        if self.size == 1:
            return text
        letters = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        dist.broadcast(length, src=0, group=self.host_group)
        if not self.is_main:
            letters = torch.empty(max(1, int(length)), dtype=torch.uint8)
        dist.broadcast(letters, src=0, group=self.host_group)
        return bytes(letters[: int(length)].tolist()).decode()

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank, in rank order. Every rank must call it."""
        letters = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(part.tolist()).decode() for part in self.all_gather_variable(letters)]

    def on_all(self, work: Callable[[], Outcome]) -> list[Outcome]:
        """The results of `work`, which uses the disk, on each rank: text or None. Every rank must call it.

        An OSError of one rank is raised on all of them; one that will stay comes before a transient one.
        """
        try:
            outcome: list[Any] = [work()]
        except OSError as error:
            outcome = [error.errno, error.strerror or str(error), error.filename and str(error.filename)]
        outcomes = [json.loads(text) for text in self.gather_text(json.dumps(outcome))]
        if faults := [OSError(*each) for each in outcomes if len(each) > 1]:
            raise next((fault for fault in faults if not is_transient(fault)), faults[0])
        return [result for (result,) in outcomes]

    def any(self, flag: bool) -> bool:
        """True if `flag` is True on any rank. Every rank must call it."""
        return self.all_reduce_sum([float(flag)])[0] > 0


def gpus_out_of_reach() -> int:
    """The number of NVIDIA GPUs of this machine if torch can use none of them, else 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        offered = len(glob.glob("/dev/nvidia[0-9]*"))
    else:
        offered = len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    return 0 if torch.cuda.is_available() else offered


def resolve_device(device: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The device of this process. Raises ConfigError for cuda on a machine where torch sees no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here: set device=cpu, or run `gr doctor` for the remedy")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def use_cpu_well(world: World) -> None:
    """Gives a rank that trains on CPU its share of the cores, and lets it keep freed memory. For entry points.

    OMP_NUM_THREADS has precedence, except for the 1 that torchrun sets by itself.
    """
    if world.device.type == "cpu":
        torch.set_num_threads(cpu_threads(world.local_size, len(os.sched_getaffinity(0)), os.environ))
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets glibc keep what this process frees. For entry points.

    By default it maps each large tensor of each step or batch anew, and the kernel clears its pages.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def cpu_threads(local_size: int, cores: int, environment: Mapping[str, str]) -> int:
    """The number of threads of one of `local_size` ranks on a machine with `cores`.

    Raises ConfigError for more than MOST_THREADS in OMP_NUM_THREADS: OpenMP crashes where it cannot start them.
    """
    requested = environment.get("OMP_NUM_THREADS", "")
    set_by_torchrun = requested == "1" and "TORCHELASTIC_RUN_ID" in environment
    if requested.isdecimal() and requested.strip("0") and not set_by_torchrun:
        if len(requested) > 9 or int(requested) > MOST_THREADS:
            raise ConfigError(
                f"OMP_NUM_THREADS={requested[:40]}: at most {MOST_THREADS}; unset it for this rank's share of {cores}"
            )
        return int(requested)
    return max(1, cores // local_size)


@contextmanager
def world(
    device: Literal["auto", "cpu", "cuda"] = "auto", *, timeout: float = TIMEOUT_SECONDS, logs: Path | None = None
) -> Iterator[World]:
    """Joins the process group that torchrun describes in the environment, or makes one of a single process.

    timeout: seconds after which a collective fails. logs: the folder for the flight record that NCCL writes then.
    Raises ConfigError for more ranks than this host has CPUs or GPUs and for an incomplete environment, TransientError
    if the other ranks cannot be reached.
    """
    rank, size, local_rank, local_size = _place()
    resolved = resolve_device(device, local_rank)
    if device == "auto" and not local_rank and (unusable := gpus_out_of_reach()):
        log.warning(
            "running on CPU: %s offers %d GPU(s), and torch %s can use none: `gr doctor` says why; set device=cpu if "
            "CPU is meant",
            *(socket.gethostname(), unusable, torch.__version__),
        )
    check_room(resolved.type, local_size)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
        _record_flights(logs)
    backend = "nccl" if resolved.type == "cuda" else "gloo"
    if size > 1:
        _check_rendezvous(rank)
    store = _store(size, local_size, timeout)
    # TorchRec reads the local world size from the environment and assumes 8 where it is missing.
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(local_size))
    watchdog.enter("joining the other ranks")
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        raise TransientError(f"rank {rank} on {socket.gethostname()} cannot join: {reason}") from error
    watchdog.add_detail(_collectives)
    try:
        yield World(rank, size, local_rank, local_size, resolved, _host_group(timeout))
    finally:
        dist.destroy_process_group()


def _place() -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size from the environment; one process where it says nothing.

    Raises ConfigError where a variable holds no such number.
    """
    size = whole_number("WORLD_SIZE", 1, least=1)
    rank = whole_number("RANK", 0, most=size - 1)
    local_size = whole_number("LOCAL_WORLD_SIZE", size, least=1)
    return rank, size, whole_number("LOCAL_RANK", 0, most=local_size - 1), local_size


def _store(size: int, local_size: int, timeout: float) -> dist.Store | None:
    """The store with the addresses of the ranks, or None for torch's own choice.

    The torchrun of torch 2.13 shares one store among all attempts, so the faster ranks of an attempt would find the
    addresses of dead ranks. Here each attempt gets its own keys. Over several hosts the numbers of attempts may differ;
    there launch.node switches the sharing off.
    """
    if size == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or local_size < size:
        return None
    shared = dist.TCPStore(
        os.environ["MASTER_ADDR"], whole_number("MASTER_PORT", 0), is_master=False, timeout=timedelta(seconds=timeout)
    )
    return dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", shared)


def _host_group(timeout: float) -> dist.ProcessGroup | None:
    """World.host_group. Raises ConfigError if gloo cannot connect the hosts."""
    if dist.get_backend() == "gloo":
        return None
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ConfigError(
            f"{socket.gethostname()}: the hosts of the ranks cannot talk by gloo, beside NCCL: "
            f"{str(error).splitlines()[0]}; set GLOO_SOCKET_IFNAME to the network interface between them"
        ) from error


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """A context that queues its work on `stream`; with None it changes nothing and does not touch CUDA."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def check_room(device: str, local_size: int) -> None:
    """Raises ConfigError when this host has fewer GPUs (device cuda) or CPUs than ranks.

    GR_MORE_RANKS_THAN_CPUS=1 in the environment lets ranks share CPUs, for tests of what they do and not how fast.
    """
    if device == "cpu" and whole_number("GR_MORE_RANKS_THAN_CPUS", 0, most=1):
        return
    capacity = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    if local_size > capacity:
        kind = "GPUs" if device == "cuda" else "CPUs"
        raise ConfigError(
            f"{local_size} ranks on {socket.gethostname()}, which has {capacity} {kind}: "
            f"start at most {capacity} a host (torchrun --nproc-per-node {capacity})"
        )


def _check_rendezvous(rank: int) -> None:
    """Raises ConfigError if the rendezvous address is missing, TransientError if it stays silent for CONNECT_SECONDS.

    Without torchrun rank 0 listens at that address, and may start later than the others.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise ConfigError(
            "WORLD_SIZE is set, but MASTER_ADDR or MASTER_PORT is not: start the ranks with torchrun, or unset "
            "WORLD_SIZE to run one process"
        )
    whole_number("MASTER_PORT", 0, least=1, most=65535)
    if rank == 0:
        return
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"{socket.gethostname()} cannot reach rank 0 at {address}:{port}: {error}; check that name and "
                    "that port from here, or set torchrun's --rdzv-endpoint to an address that every host reaches"
                ) from None
            if time.monotonic() > deadline - CONNECT_SECONDS + 10:
                log_once(log, f"waiting for rank 0 at {address}:{port}: {error}")
            time.sleep(1)


def _record_flights(logs: Path | None) -> None:
    """Lets NCCL record its last collectives and write them when one times out, unless the user's settings differ."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if logs is not None:
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(logs / "nccl-rank-"))


def _collectives(folder: Path) -> str:
    """The current or last collective of this rank, in words; writes the records of torch to the folder.

    On GPUs there are two: one of NCCL and one of gloo, which connects the hosts.
    """
    records = {"collectives": c10d._dump_fr_trace_json()}  # type: ignore[attr-defined]
    if dist.get_backend() == "nccl":
        records["collectives-nccl"] = c10d._dump_nccl_trace_json()  # type: ignore[attr-defined]
    return "; ".join(_last(record, folder / f"{name}-rank-{dist.get_rank()}.json") for name, record in records.items())


def _last(record: bytes, path: Path) -> str:
    entries = json.loads(record).get("entries", [])
    if not entries:
        return "no collective yet"
    path.write_bytes(record)
    last = entries[-1]
    when = "after" if last["retired"] else "in"
    return f"{when} collective {last['collective_seq_id']}, {last['profiling_name']} of {last['input_sizes']}"

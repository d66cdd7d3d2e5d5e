"""Runs a function on several gloo ranks of this machine: forked after the imports, so a job costs 0.2 s, not 4 s."""

import gc
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchrec  # noqa: F401  imported before the fork, so that no rank pays for it

from gr.dist import World, use_cpu_well

WALL_SECONDS = 600  # a hang is found by the process group long before


class RankError(AssertionError):
    """A rank raised, died or did not finish."""


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(world, *args)` on `size` ranks; returns what each returned, in rank order. Raises RankError."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="gr-ranks-") as folder:
        store = Path(folder) / "store"
        processes = [
            context.Process(target=_rank, args=(function, args, rank, size, store, results)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(results, processes, size)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(results, processes, size: int) -> list[Any]:
    values: dict[int, Any] = {}
    deadline = time.monotonic() + WALL_SECONDS
    while len(values) < size:
        try:
            rank, value, fault = results.get(timeout=0.5)
        except queue.Empty:
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead or time.monotonic() > deadline:
                raise RankError(f"ranks died with exit codes {dead}" if dead else "ranks did not finish") from None
            continue
        if fault:
            raise RankError(f"rank {rank} of {size}:\n{fault}")
        values[rank] = value
    return [values[rank] for rank in range(size)]


def _rank(function, args, rank: int, size: int, store: Path, results) -> None:
    # What the parent left to collect (process groups, DDP's reducers) has threads that a fork does not copy: collecting
    # it here crashes.
    gc.freeze()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    world = World(rank, size, rank, size, torch.device("cpu"))
    use_cpu_well(world)  # as `gr train`: one CPU second of seven of a small job was for pages given back and cleared
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=180)
        )
        value = function(world, *args)
        results.put((rank, value, None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))

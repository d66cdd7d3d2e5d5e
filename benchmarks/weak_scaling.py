"""What a step costs as ranks grow with the work: real gloo processes on this machine, beside a simulated rank.

    python -m benchmarks.weak_scaling [--ranks 1 2 4 8] [--rows 20000] [--batch 8] [KEY=VALUE ...]

Rows and examples a rank stay the same. CPU seconds of a rank and step are counted, the least of 24 steps, for ranks
share this machine's CPUs (GR_MORE_RANKS_THAN_CPUS): its wall time says how many CPUs there are, not what a rank does.
Predicted, from one process: a rank's own work, in a world whose other ranks do as it does and send nothing (Mirror:
bucketing, permuting, deduplication and DDP begin with the second rank, and are all in it); its messages (one to every
other rank for each collective) and its bytes, at the cost that empty and large all-to-alls have in gloo's processes.
Bytes are counted as they are given to collectives; bytes held are compared with the planner's. Last, what the clock
shows beside CPU time in the median step: waiting for other ranks, and for this machine's CPUs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed import distributed_c10d
from torch.distributed._shard import sharded_tensor, sharding_spec

from benchmarks.machine import describe
from benchmarks.retrieval import do_step, first_batches, training
from gr.config import load_config
from gr.config.retrieval import RetrievalConfig
from gr.dist import World, world
from gr.planner.estimate import MEMORY, estimate
from gr.prepare.synthetic import StreamOptions, write_stream

MIRRORED = "GR_WEAK_SCALING_MIRRORED"  # the ranks of a mirrored world, of a process that has none
WARMUPS, STEPS = 3, 24
LARGE = 1 << 20  # floats of a rank in an all-to-all that measures bytes
COLLECTIVES = (
    "all_to_all_single",
    "all_reduce",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


class Mirror(dist.ProcessGroup):
    """A group of one process, which is rank 0: each of the other ranks does as it does, at once.

    So what they send to it is what it sends to itself, and a rank does all of its own work, at any number of ranks,
    without messages. Sums are not taken, as nothing but their values would change.
    """

    def getBackendName(self) -> str:
        return "mirror"

    @property
    def group_name(self) -> str:
        return distributed_c10d._world.pg_names[self]

    def allreduce(self, tensors, options=None) -> dist.Work:
        return _done(tensors)

    def broadcast(self, tensors, options=None) -> dist.Work:
        return _done(tensors)

    def barrier(self, options=None) -> dist.Work:
        return _done([])

    def allgather(self, taken, given, options=None) -> dist.Work:
        for parts, own in zip(taken, given, strict=True):
            for part in parts:
                part.copy_(own)
        return _done(taken)

    def all_gather_single(self, taken, given, options=None) -> dist.Work:
        taken.view(self.size(), -1).copy_(given.view(1, -1))
        return _done([taken])

    def reduce_scatter_single(self, taken, given, options=None) -> dist.Work:
        taken.copy_(given[: len(taken)])
        return _done([taken])

    def all_to_all_single(self, taken, given, taken_sizes, given_sizes, options=None) -> dist.Work:
        own = given[: given_sizes[0] if given_sizes else len(given) // self.size()]
        for part in taken.split(taken_sizes or [len(own)] * self.size()):
            # Vectors come by how many ids each rank was asked for, which differ a little.
            shared = min(len(part), len(own))
            part[:shared].copy_(own[:shared])
            part[shared:].zero_()
        return _done([taken])


def _done(tensors: list[torch.Tensor]) -> dist.Work:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(tensors)
    return _create_work_from_future(future)


@contextmanager
def mirrored(ranks: int) -> Iterator[World]:
    """This process as rank 0 of `ranks` that do as it does."""
    dist.Backend.register_backend("mirror", lambda store, rank, size, timeout: Mirror(rank, size), devices=["cpu"])
    environ["LOCAL_WORLD_SIZE"] = str(ranks)  # which TorchRec reads
    # All ranks say that they have the rows of the first.
    for module in (sharded_tensor.utils, sharding_spec.api):
        module.validate_non_overlapping_shards_metadata = lambda shards: None
    dist.init_process_group("mirror", store=dist.HashStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, 0, ranks, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


class Counter:
    """Calls of torch.distributed's collectives and the bytes given to them, while it is on."""

    def __init__(self) -> None:
        self.calls, self.bytes, self.on = 0, 0, False
        for name in COLLECTIVES:
            if (plain := getattr(dist, name, None)) is not None:
                setattr(dist, name, self._counted(plain, name))

    def _counted(self, plain: Callable, name: str) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            if self.on:
                tensors = [t for t in (*given, *named.values()) if isinstance(t, torch.Tensor)]
                self.calls += 1
                # The output comes first, but all_reduce has one tensor.
                self.bytes += tensors[-1].nbytes * (2 if name == "all_reduce" else 1)
            return plain(*given, **named)

        return call


def message_costs(ranks: int) -> tuple[float, float]:
    """CPU seconds of (a message, a byte given to a collective): from empty and from large all-to-alls.

    Each is called as a step calls it: with caches that other work has filled, and not right after another.
    """
    if ranks == 1 or dist.get_backend() == "mirror":
        return 0.0, 0.0
    others = torch.zeros(2 * LARGE)

    def exchange(count: int, times: int) -> float:
        given, taken, seconds = torch.ones(count * ranks), torch.empty(count * ranks), []
        for _ in range(times):
            others.add_(1)
            began = time.process_time()
            dist.all_to_all_single(taken, given)
            seconds.append(time.process_time() - began)
        return min(seconds)

    empty, large = exchange(1, 60), exchange(LARGE // ranks, 8)
    return empty / (ranks - 1), (large - empty) / (4 * (LARGE // ranks) * ranks)


def measured(config: RetrievalConfig, here: World) -> dict[str, float]:
    """Of this rank: CPU seconds and collectives of a step, and bytes it holds beside the planner's."""
    built, module = training(config, here)
    batches = first_batches(config, here, WARMUPS + STEPS)
    counter, taken, passed = Counter(), [], []
    for step, batch in enumerate(batches):
        counter.on = step >= WARMUPS
        began, clock = time.process_time(), time.perf_counter()
        do_step(module, batch, step)
        taken.append(time.process_time() - began)
        passed.append(time.perf_counter() - clock)
    counter.on = False
    assert built.plan is not None, "retrieval has a table"
    memory_MR, shards = estimate(built.plan).memory_MR, module.table_optimizer.shards
    kinds = [MEMORY.index(kind) for kind in ("tables", "table_optimizer")]
    states = [state.nbytes for own in module.table_optimizer.states for state in own.values()]
    dense = sum(p.nbytes for p in module.dense.values())
    message, byte = message_costs(here.size)
    return {
        "cpu": min(taken[WARMUPS:]),
        "waits": sorted(clock - cpu for clock, cpu in zip(passed, taken, strict=True))[STEPS // 2],
        "calls": counter.calls / STEPS + (here.size > 1),  # DDP's bucket goes past torch.distributed's functions
        "bytes": counter.bytes / STEPS + 2 * dense * (here.size > 1),
        "message": message,
        "byte": byte,
        "held": float(sum(shard.weight.nbytes for shard in shards) + sum(states)),
        "planned": float(memory_MR[kinds, here.rank % memory_MR.shape[1]].sum()),
    }


def one_rank(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    config = load_config(arguments[0], arguments[1:])
    assert isinstance(config, RetrievalConfig), "a retrieval configuration"
    alone = int(environ.get(MIRRORED, 0))
    with mirrored(alone) if alone else world("cpu") as here:
        own = measured(config, here)
        of_all = [json.loads(text) for text in here.gather_text(json.dumps(own))]
        if here.is_main:
            sys.stdout.write("RANKS " + json.dumps(of_all) + "\n")


def run(ranks: int, arguments: Sequence[str], *, simulated: bool = False) -> list[dict[str, float]]:
    """measured() of every rank. simulated: of a mirrored one."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *([] if simulated else launch), "-m", "benchmarks.weak_scaling", *arguments]
    place = {"RANK": "0", MIRRORED: str(ranks)} if simulated else {"GR_MORE_RANKS_THAN_CPUS": "1"}
    done = subprocess.run(command, env={**environ, **place}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RANKS ")]
    if not lines:
        raise SystemExit(f"{ranks} ranks failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("RANKS "))


def mean(ranks: list[dict[str, float]], name: str) -> float:
    return sum(each[name] for each in ranks) / len(ranks)


def main() -> None:
    if "RANK" in environ:
        return one_rank(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=8, help="examples a rank")
    options = parser.parse_args()
    print(f"{describe('cpu')}; {options.rows:,} rows and {options.batch} examples a rank\n")
    names = ["ranks", "CPU ms a rank", "own work", "messages", "bytes", "predicted", "error", "of one rank"]
    names += ["predicted", "examples/CPU-s", "kB given", "held MB", "planned MB", "clock beside CPU ms"]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    alone = None  # CPU seconds of the first line
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(prefix="gr-weak-") as folder:
            records = max(400, 2 * options.batch * ranks * (WARMUPS + STEPS))
            write_stream(StreamOptions(items=options.rows * ranks - 1, records=records, length=64), Path(folder))
            batch = f"trainer.global_batch_size={options.batch * ranks}"
            data = [f"data.path={folder}/train", f"evaluation.path={folder}/test"]
            given = ["configs/retrieval/smoke.yaml", *data, batch, *options.overrides]
            of_all, own = run(ranks, given), mean(run(ranks, given, simulated=True), "cpu")
        cpu, messages = mean(of_all, "cpu"), mean(of_all, "calls") * (ranks - 1) * mean(of_all, "message")
        moved = mean(of_all, "bytes") * mean(of_all, "byte")
        predicted = own + messages + moved
        alone = cpu if alone is None else alone
        cells = [f"{ranks}", *(f"{1e3 * each:.1f}" for each in (cpu, own, messages, moved, predicted))]
        cells += [f"{predicted / cpu - 1:+.1%}", f"{cpu / alone:.2f}", f"{predicted / alone:.2f}"]
        cells += [f"{options.batch / cpu:.0f}", f"{mean(of_all, 'bytes') / 1e3:.0f}"]
        cells += [f"{max(each[name] for each in of_all) / 1e6:.3f}" for name in ("held", "planned")]
        print(f"| {' | '.join(cells)} | {1e3 * mean(of_all, 'waits'):.1f} |", flush=True)


if __name__ == "__main__":
    main()

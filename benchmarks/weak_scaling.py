"""What a step costs as ranks grow with the work: real gloo processes on this machine, beside what messages should cost.

    python -m benchmarks.weak_scaling [--ranks 1 2 4 8] [--rows 20000] [--batch 8] [KEY=VALUE ...]

Rows and examples a rank stay the same. CPU seconds of a rank and step are counted, for ranks share this machine's
CPUs (GR_MORE_RANKS_THAN_CPUS): its wall time says how many CPUs there are, not what a rank does. Predicted: the step
of the first number of ranks that share anything, with the messages (one to every other rank for each collective) and
the bytes of this one in place of its own, at the cost of each that empty and large all-to-alls have in the same
processes. Bytes are counted as they are given to collectives; bytes held are compared with the planner's.
A second table says what a rank does over a lone rank's step, which has neither DDP nor TorchRec's exchange of ids:
messages, bytes, the rest (Python of both, and tensors they make), and what the clock shows beside CPU time: waiting for
other ranks, and for this machine's CPUs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from os import environ
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.machine import describe
from benchmarks.retrieval import do_step, first_batches, training
from gr.config import load_config
from gr.config.retrieval import RetrievalConfig
from gr.dist import World, world
from gr.planner.estimate import MEMORY, estimate
from gr.prepare.synthetic import StreamOptions, write_stream

WARMUPS, STEPS, ROUNDS = 3, 8, 5
LARGE = 1 << 20  # floats of a rank in an all-to-all that measures bytes
COLLECTIVES = (
    "all_to_all_single",
    "all_reduce",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


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


def least(work: Callable[[], None]) -> float:
    """The least CPU seconds of ROUNDS calls, all threads."""
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def message_costs(ranks: int) -> tuple[float, float]:
    """CPU seconds of (a message, a byte given to a collective): from empty and from large all-to-alls."""
    if ranks == 1:
        return 0.0, 0.0

    def exchange(count: int, times: int) -> Callable[[], None]:
        given, taken = torch.ones(count * ranks), torch.empty(count * ranks)

        def call() -> None:
            for _ in range(times):
                dist.all_to_all_single(taken, given)

        return call

    empty = least(exchange(1, 200)) / 200
    large = least(exchange(LARGE // ranks, 4)) / 4
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
        "cpu": sorted(taken[WARMUPS:])[STEPS // 2],
        "clock": sorted(passed[WARMUPS:])[STEPS // 2],
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
    with world("cpu") as here:
        own = measured(config, here)
        of_all = [json.loads(text) for text in here.gather_text(json.dumps(own))]
        if here.is_main:
            sys.stdout.write("RANKS " + json.dumps(of_all) + "\n")


def run(ranks: int, config: str, overrides: Sequence[str]) -> list[dict[str, float]]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", "benchmarks.weak_scaling", config, *overrides]
    done = subprocess.run(command, env={**environ, "GR_MORE_RANKS_THAN_CPUS": "1"}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RANKS ")]
    if not lines:
        raise SystemExit(f"{ranks} ranks failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("RANKS "))


def mean(ranks: list[dict[str, float]], name: str) -> float:
    return sum(each[name] for each in ranks) / len(ranks)


def predicted_cells(predicted: float, cpu: float) -> list[str]:
    return [f"{1e3 * predicted:.1f}", f"{predicted / cpu - 1:+.1%}"]


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
    names = ("ranks", "CPU ms a rank", "predicted", "error", "examples/CPU-s", "kB given", "held MB", "planned MB")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    base = None  # CPU seconds of a step without its messages and bytes
    alone, over = None, []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(prefix="gr-weak-") as folder:
            records = max(400, 2 * options.batch * ranks * (WARMUPS + STEPS))
            write_stream(StreamOptions(items=options.rows * ranks - 1, records=records, length=64), Path(folder))
            batch = f"trainer.global_batch_size={options.batch * ranks}"
            given = [f"data.path={folder}/train", f"evaluation.path={folder}/test", batch, *options.overrides]
            of_all = run(ranks, "configs/retrieval/smoke.yaml", given)
        cpu, messages = mean(of_all, "cpu"), mean(of_all, "calls") * (ranks - 1) * mean(of_all, "message")
        moved = mean(of_all, "bytes") * mean(of_all, "byte")
        sent = messages + moved
        cells = [f"{ranks}", f"{1e3 * cpu:.1f}", *(["-"] * 2 if base is None else predicted_cells(base + sent, cpu))]
        if base is None and ranks > 1:
            base = cpu - sent
        cells += [f"{options.batch / cpu:.0f}", f"{mean(of_all, 'bytes') / 1e3:.0f}"]
        cells += [f"{max(each[name] for each in of_all) / 1e6:.3f}" for name in ("held", "planned")]
        print(f"| {' | '.join(cells)} |", flush=True)
        alone = cpu if ranks == 1 else alone
        if alone is not None and ranks > 1:
            waits = mean(of_all, "clock") - cpu
            parts = (cpu - alone, messages, moved, cpu - alone - sent, waits)
            over.append(f"| {ranks} | {cpu / alone:.2f} | {' | '.join(f'{1e3 * part:.1f}' for part in parts)} |")
    if over:
        names = ("ranks", "a lone rank = 1", "ms over it", "messages", "bytes", "the rest", "clock beside CPU")
        print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
        print("\n".join(over))


if __name__ == "__main__":
    main()

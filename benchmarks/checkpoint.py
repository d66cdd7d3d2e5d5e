"""What a save and a load cost: CPU seconds a GB, extra memory, and how long training waits.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint --rows 8000000 --dim 64 --rounds 3

One process with one table and its row-wise Adagrad, as TorchRec shards them. Each measurement is a process of its own,
in turns with torch.save of the same tensors to a file that is synced too; the least of the rounds counts, since others
on the machine only ever slow one down. Extra memory: the peak above what the process held just before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import describe, peak_kib, reset_peak
from gr.checkpoint import CheckpointStore, ModelState, load_state, verify
from gr.dist import World, world
from gr.embeddings import CANDIDATE_FEATURE, TableOptimizer, build_tables, initialise_tables
from gr.parallel.tables import shard_tables
from gr.planner.for_run import make_plan
from tests.support.schemas import item_schema
from tests.support.tiny import tiny_config

GB, MIB = 1e9, 1 << 20


def state_of(rows: int, dim: int, own: World) -> ModelState:
    """A table of `rows` x `dim` under fbgemm's row-wise Adagrad, and no dense part."""
    optimizer = {"kind": "rowwise_adagrad"}
    sections = {"model": {"dim": dim}, "embeddings": {"optimizer": optimizer}, "planner": {"sharding": "row_wise"}}
    config = tiny_config(Path("unused"), Path("unused"), **sections)
    schema = item_schema(rows)
    with torch.device("meta"):
        tables = build_tables(config.tables(schema), {"item_id": ("item_id", CANDIDATE_FEATURE)})
        model = nn.ModuleDict({"tables": tables})
    _, plan = make_plan(model, config.inventory(schema), config, own)
    sharded = shard_tables(model, plan, config.embeddings, own.device)
    initialise_tables(sharded, seed=1, embeddings=config.embeddings, dim=dim)
    return ModelState({}, None, TableOptimizer(sharded, config.embeddings, 1))


def bytes_of(state: ModelState) -> int:
    return sum(tensor.nbytes for entry in state.tables.entries() for _, tensor in entry.shards)


class Measured:
    """CPU seconds, wall seconds and extra MiB of what is done under it.

    waited, took: seconds that training waits for work in the background, and that this takes; 0 for other work.
    """

    waited, took = 0.0, 0.0

    def __enter__(self) -> "Measured":
        reset_peak()
        self.before, self.cpu, self.wall = resident_kib(), time.process_time(), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = time.process_time() - self.cpu, time.monotonic() - self.wall
        self.extra = (peak_kib() - self.before) / 1024


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))


def saved(state: ModelState, folder: Path, own: World) -> Measured:
    store = CheckpointStore(folder, state, "config: 1\n", own, asynchronous=False)
    with Measured() as figures:
        store.save({"step": 1, "data": {}}, keep_last=1)
    return figures


def saved_by_torch(state: ModelState, folder: Path, _: World) -> Measured:
    tensors = {
        f"{entry.name}.{i}": each for entry in state.tables.entries() for i, (_, each) in enumerate(entry.shards)
    }
    with Measured() as figures, (folder / "tables.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    return figures


def saved_in_the_background(state: ModelState, folder: Path, own: World) -> Measured:
    """The memory is that of the store too, whose copies are made before training."""
    with Measured() as figures:
        store = CheckpointStore(folder, state, "config: 1\n", own, asynchronous=True)
        began, figures.cpu = time.monotonic(), time.process_time()
        store.save({"step": 1, "data": {}}, keep_last=1)
        figures.waited = time.monotonic() - began
        store.finish()
        figures.took = time.monotonic() - began
    return figures


def loaded(state: ModelState, folder: Path, own: World) -> Measured:
    path = saved_folder(state, folder, own)
    with Measured() as figures:
        load_state(path, state, own)
    return figures


def verified(state: ModelState, folder: Path, own: World) -> Measured:
    path = saved_folder(state, folder, own)
    with Measured() as figures:
        verify(path, own)
    return figures


def saved_folder(state: ModelState, folder: Path, own: World) -> Path:
    saved(state, folder, own)
    return next(folder.glob("step-*"))


WORK: dict[str, Callable[[ModelState, Path, World], Measured]] = {
    "torch.save": saved_by_torch,
    "save": saved,
    "save in the background": saved_in_the_background,
    "load": loaded,
    "verify": verified,
}


def measure(name: str, rows: int, dim: int, folder: str) -> None:
    """In a process of its own: prints the figures as JSON."""
    with world("cpu") as own, tempfile.TemporaryDirectory(dir=folder) as parent:
        state = state_of(rows, dim, own)
        figures = WORK[name](state, Path(parent), own)
        size = bytes_of(state)
    waited, took = figures.waited or figures.wall, figures.took or figures.wall
    print(json.dumps([size, figures.cpu / size * GB, figures.extra, waited / size * GB, waited / took]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="Where checkpoints are written.")
    parser.add_argument("--only", choices=WORK, help="One measurement, as JSON.")
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.rows, options.dim, options.folder)
        return
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--folder", options.folder, "--only"]
    sizes = ["--rows", str(options.rows), "--dim", str(options.dim)]
    taken: dict[str, list[list[float]]] = {name: [] for name in WORK}
    for _ in range(options.rounds):
        for name in WORK:
            done = subprocess.run([*command, name, *sizes], capture_output=True, text=True, check=True)
            taken[name].append(json.loads(done.stdout.splitlines()[-1]))
    size = taken["save"][0][0]
    print(f"{describe('cpu')}. {options.rows:,} rows x {options.dim}, {size / GB:.2f} GB with states\n")
    print(
        "| | CPU s a GB | extra MiB | of the tables | training waits, s a GB | of its time |\n|---|---|---|---|---|---|"
    )
    for name, rounds in taken.items():
        cpu, extra, waited, share = (min(values) for values in list(zip(*rounds, strict=True))[1:])
        print(f"| {name} | {cpu:.2f} | {extra:,.0f} | {extra * MIB / size:.1%} | {waited:.2f} | {share:.1%} |")


if __name__ == "__main__":
    main()

"""Deltas under kills and misuse: what `gr apply` writes is the published checkpoint, bit for bit, or it is refused.

    OMP_NUM_THREADS=1 python -m benchmarks.deltas --sequences 1000
    OMP_NUM_THREADS=1 python -m benchmarks.deltas --rows 1000000 --dim 64 --touched 10000

A sequence is a run of random tables. After each step `gr publish --since` is killed with SIGKILL before a random file
operation, some times, and then left to finish. `gr apply` is killed too, and then given the deltas in order, or with a
gap, a repeat, another order, a delta of another run, a flipped bit, a file cut short or missing. A silent error is a
checkpoint that is not the published one, or any answer but a refusal where one is due. Damage is harmless where the
checkpoint is the published one all the same: the last line break of SHA256SUMS, cut off, says nothing.

With --rows: the size of a delta of so many touched rows beside the rows themselves, and what it costs to make and
apply it.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.killed_writers import operations
from benchmarks.machine import describe, peak_kib, reset_peak
from gr.checkpoint import CheckpointStore, ModelState
from gr.checkpoint.apply import apply_deltas
from gr.checkpoint.delta import deltas_in, publish_delta, read_manifest
from gr.checkpoint.layout import CheckpointFolder
from gr.checkpoint.saved_rows import SavedRows, octets
from gr.errors import GRError
from gr.models.saved import ALONE

DAMAGES = ("flipped bit", "cut short", "missing file", "base")
FAULTS = ("none", "none", "gap", "repeat", "order", "other run", *DAMAGES)


class Entry:
    def __init__(self, name: str, value: Tensor) -> None:
        self.name, self.value, self.is_rowwise, self.column_widths = name, value, False, (value.shape[1],)


class Tables:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def entries(self) -> list[Entry]:
        return [Entry(name, tensor) for name, tensor in self.tensors.items()]

    def set_steps(self, steps: int) -> None: ...


class Run:
    """Checkpoints of tables that change at random."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.step = tensors, 0
        self.dense = nn.Parameter(torch.zeros(9))
        state = ModelState({"w": self.dense}, None, Tables(tensors))
        self.store = CheckpointStore(folder, state, "config: 1\n", ALONE, asynchronous=False)

    def save(self) -> Path:
        self.store.save({"step": self.step, "data": {"position": self.step}}, keep_last=99)
        return self.store.folder.final(self.step)

    def train(self, chance: random.Random, most: int) -> None:
        self.step += chance.randint(1, 5)
        rows = torch.randint(0, len(next(iter(self.tensors.values()))), (chance.randint(0, most),)).unique()
        for tensor in self.tensors.values():
            tensor[rows] = torch.randn(len(rows), tensor.shape[1]).to(tensor.dtype)
        self.dense.data[self.step % 9] = self.step


def random_run(folder: Path, chance: random.Random) -> Run:
    rows, dim = chance.randint(1, 300), chance.randint(1, 16)
    dtype = chance.choice((torch.float32, torch.float16, torch.bfloat16))
    return Run(folder, {"items.weight": torch.randn(rows, dim).to(dtype), "items.sum": torch.rand(rows, 1)})


def bits(path: Path) -> dict[str, bytes]:
    saved = SavedRows(path)
    return {name: bytes(octets(saved.read(name))) for name in saved.tensors}


def published(run: Run, out: Path, chance: random.Random, counts: Counter) -> None:
    """Trains, saves and publishes; before it succeeds, the command may be killed."""
    since = run.step
    run.train(chance, most=20)
    checkpoint = run.save()
    work = partial(publish_delta, checkpoint, since, out)
    while chance.random() < 0.4:
        counts["kills"] += 1
        before = len(deltas_in(out))
        operations(out, work, chance.randint(1, 25))
        for delta in deltas_in(out):
            read_manifest(delta)  # raises where it is not whole
        if len(deltas_in(out)) > before:  # killed after it was done, or not in time
            return
    work()


def damaged(fault: str, deltas: list[Path], base: Path, other: Path, chance: random.Random) -> list[Path]:
    """The deltas to apply, with what the fault says done to them or to the base."""
    if fault == "gap":
        at = chance.randrange(len(deltas) - 1)
        return [*deltas[:at], *deltas[at + 1 :]]
    if fault == "repeat":
        at = chance.randrange(len(deltas))
        return [*deltas[: at + 1], *deltas[at:]]
    if fault == "order":
        return deltas[::-1]
    if fault == "other run":
        return [*deltas[:-1], other]
    folder = base if fault == "base" else chance.choice(deltas)
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if fault == "missing file":
        file.unlink()
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    elif fault != "none":
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return deltas


def sequence(folder: Path, seed: int, counts: Counter) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    run, deltas = random_run(folder / "run", chance), folder / "deltas"
    base = run.save()
    for _ in range(chance.randint(2, 4)):
        published(run, deltas, chance, counts)
    truth, fault = bits(run.store.folder.final(run.step)), chance.choice(FAULTS)
    given = deltas_in(deltas)
    torch.manual_seed(seed + 10**6)
    other = Run(folder / "other", {name: torch.randn_like(tensor) for name, tensor in run.tensors.items()})
    steps = CheckpointFolder(folder / "run").steps()
    for step in steps[-2:]:
        other.step = step
        other.train(random.Random(seed), most=9)
        other.step = step
        other.save()
    publish_delta(folder / f"other/step-{steps[-1]:08d}", steps[-2], folder / "others")
    given = damaged(fault, given, base, folder / "others/000001", chance)
    out = folder / "applied/full"
    work = partial(apply_deltas, base, given, out)
    if fault == "none" and chance.random() < 0.5:
        counts["kills"] += 1
        out.parent.mkdir()
        operations(out.parent, work, chance.randint(1, 25))
    try:
        if not out.exists():
            work()
    except GRError as error:
        due = fault != "none" and "\n" not in str(error)
        counts[f"refused: {fault}" if due else "silent"] += 1
        if not due:
            print(f"sequence {seed}, {fault}: {error}", flush=True)
        return
    equal = bits(out) == truth
    outcome = "equal" if equal and fault == "none" else "harmless" if equal and fault in DAMAGES else "silent"
    counts[outcome] += 1
    if outcome != "equal":
        print(f"sequence {seed}, {fault}: {outcome}", flush=True)


def measure(rows: int, dim: int, touched: int, folder: Path) -> None:
    run = Run(folder / "run", {"items.weight": torch.randn(rows, dim), "items.sum": torch.rand(rows, 1)})
    base = run.save()
    ids = torch.randperm(rows)[:touched]
    run.step = 1
    for tensor in run.tensors.values():
        tensor[ids] += 1
    checkpoint = run.save()
    size = sum(tensor.nbytes for tensor in run.tensors.values())
    changed = sum(tensor[0].nbytes for tensor in run.tensors.values()) * touched
    print(f"{describe('cpu')}. {rows:,} rows x {dim}, {size / 1e9:.2f} GB with states, {touched:,} touched\n")
    for name, work in (
        ("publish", lambda: publish_delta(checkpoint, 0, folder / "deltas")),
        ("apply", lambda: apply_deltas(base, deltas_in(folder / "deltas"), folder / "full")),
    ):
        reset_peak()
        before, began = peak_kib(), time.process_time()
        work()
        cpu, extra = time.process_time() - began, (peak_kib() - before) / 1024
        print(f"{name}: {cpu / size * 1e9:.2f} CPU s a GB of the tables, {extra:,.0f} MiB of memory")
    written = sum(path.stat().st_size for path in (folder / "deltas/000001").rglob("*") if path.is_file())
    print(f"delta: {written:,} bytes, {written / changed:.3f} of the touched rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="Measure one delta of a table of so many rows.")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--touched", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        if options.rows:
            measure(options.rows, options.dim, options.touched, Path(parent))
            return
        counts: Counter[str] = Counter({"silent": 0})
        for seed in range(options.seed, options.seed + options.sequences):
            folder = Path(parent) / str(seed)
            folder.mkdir()
            try:
                sequence(folder, seed, counts)
            except Exception as error:
                raise RuntimeError(f"sequence {seed}") from error
            shutil.rmtree(folder)
            done = seed - options.seed + 1
            if done % 100 == 0 or done == options.sequences:
                print(f"{describe('cpu')}. {done:,} sequences: {dict(sorted(counts.items()))}", flush=True)


if __name__ == "__main__":
    main()

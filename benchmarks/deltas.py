"""Deltas under kills and misuse: what `gr apply` writes is the published checkpoint, bit for bit, or it is refused.

    OMP_NUM_THREADS=1 python -m benchmarks.deltas --sequences 1000
    OMP_NUM_THREADS=1 python -m benchmarks.deltas --rows 1000000 --dim 64 --touched 10000 [--dynamic lru]

A sequence is a run of random tables, of which half have dynamic ids, whose rows change hands. After each step
`gr publish --since` is killed with SIGKILL before a random file operation, some times, and then left to finish.
`gr apply` is killed too, and then given the deltas in order, or with a gap, a repeat, another order, a delta of another
run, a flipped bit, a file cut short or missing. A silent error is a checkpoint that is not the published one, or any
answer but a refusal where one is due. Damage is harmless where the checkpoint is the published one all the same: the
last line break of SHA256SUMS, cut off, says nothing. Somebody who keeps rows by raw id, and follows the deltas without
the map, must have those of the last checkpoint and no others.

With --rows: the size of a delta of so many touched rows beside the rows themselves, and what it costs to make and
apply it. With dynamic ids the touched rows are those of so many raw ids, every tenth of which is new.
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
from safetensors.torch import load_file
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
from gr.ops.id_table import IdTable, id_table_step
from gr.ops.splitmix64 import shift_right, splitmix64

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
    """Checkpoints of tables that change at random.

    ids: the map of dynamic ids, which are admitted after as many uses as it counts; None where ids are rows.
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor], ids: IdTable | None = None) -> None:
        self.tensors, self.ids, self.step = tensors, ids, 0
        self.dense = nn.Parameter(torch.zeros(9))
        maps = {} if ids is None else {"raw_id": ids.key_SA, "score": ids.score_SA, "seen": ids.seen_SC}
        saved = tensors | {f"items/ids.{name}": tensor for name, tensor in maps.items() if tensor is not None}
        state = ModelState({"w": self.dense}, None, Tables(saved))
        self.store = CheckpointStore(folder, state, "config: 1\n", ALONE, asynchronous=False)

    def save(self) -> Path:
        self.store.save({"step": self.step, "data": {"position": self.step}}, keep_last=99)
        return self.store.folder.final(self.step)

    def train(self, chance: random.Random, most: int) -> None:
        self.step += chance.randint(1, 5)
        rows = len(next(iter(self.tensors.values())))
        touched = torch.randint(0, rows if self.ids is None else 2 * rows, (chance.randint(0, most),)).unique()
        self.touch(touched if self.ids is None else self.rows_of(shift_right(splitmix64(touched), 1)))
        self.dense.data[self.step % 9] = self.step

    def rows_of(self, ids_U: Tensor) -> Tensor:
        """The rows of distinct raw ids that a step uses once each, distinct."""
        assert self.ids is not None
        lfu = self.ids.score_SA.dtype == torch.float32
        stamp = 2.0 ** (self.step / 16) if lfu else self.step + 1
        min_count = 1 if self.ids.seen_SC is None else 2
        return id_table_step(self.ids, ids_U, torch.ones_like(ids_U), stamp, min_count).row_U.unique()

    def touch(self, rows: Tensor) -> None:
        for tensor in self.tensors.values():
            tensor[rows] = torch.randn(len(rows), tensor.shape[1]).to(tensor.dtype)


def random_run(folder: Path, chance: random.Random) -> Run:
    rows, dim, ids = chance.randint(1, 300), chance.randint(1, 16), None
    dtype = chance.choice((torch.float32, torch.float16, torch.bfloat16))
    if chance.random() < 0.5:
        ways, score = chance.randint(2, 9), chance.choice((torch.int32, torch.float32))
        sets = max(1, rows // ways)
        rows, ids = sets * ways, IdTable.empty(0, sets, sets, ways, score, counted=chance.random() < 0.5)
    run = Run(folder, {"items.weight": torch.randn(rows, dim).to(dtype), "items.sum": torch.rand(rows, 1)}, ids)
    if ids is not None:
        run.train(chance, most=3 * rows)  # fills most rows
    return run


def bits(path: Path) -> dict[str, bytes]:
    saved = SavedRows(path)
    return {name: bytes(octets(saved.read(name))) for name in saved.tensors}


Vectors = dict[int, tuple[bytes, bytes]]  # weight and state by raw id


def vectors_of(raw_id: Tensor, weight: Tensor, state: Tensor) -> Vectors:
    return {
        raw: (bytes(octets(weight[row])), bytes(octets(state[row])))
        for row, raw in enumerate(raw_id.flatten().tolist())
        if raw >= 0
    }


def saved_vectors(path: Path) -> Vectors:
    saved = SavedRows(path)
    if "tables.items/ids.raw_id" not in saved.tensors:
        return {}
    return vectors_of(*(saved.read(f"tables.items{name}") for name in ("/ids.raw_id", ".weight", ".sum")))


def follow(vectors: Vectors, delta: Path, counts: Counter) -> None:
    """What a keeper of vectors by raw id does with a delta."""
    for part in read_manifest(delta).parts:
        tensors = load_file(delta / part)
        for raw in tensors.get("deleted.items", torch.empty(0)).tolist():
            del vectors[raw]
            counts["ids deleted"] += 1
        if "tables.items/ids.raw_id" in tensors:
            vectors |= vectors_of(*(tensors[f"tables.items{name}"] for name in ("/ids.raw_id", ".weight", ".sum")))


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
    vectors = saved_vectors(base)
    for delta in given:
        follow(vectors, delta, counts)
    if vectors != saved_vectors(run.store.folder.final(run.step)):
        counts["silent"] += 1
        print(f"sequence {seed}: other rows by raw id", flush=True)
    torch.manual_seed(seed + 10**6)
    other = Run(folder / "other", {name: torch.randn_like(tensor) for name, tensor in run.tensors.items()}, run.ids)
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


def measure(rows: int, dim: int, touched: int, eviction: str | None, folder: Path) -> None:
    ids, ways = None, 64
    if eviction is not None:
        score = torch.int32 if eviction == "lru" else torch.float32
        ids = IdTable.empty(0, rows // ways, rows // ways, ways, score, counted=False)
        rows = rows // ways * ways
    run = Run(folder / "run", {"items.weight": torch.randn(rows, dim), "items.sum": torch.rand(rows, 1)}, ids)
    raw = shift_right(splitmix64(torch.arange(rows)), 1)  # more than find a row: the table is full
    if ids is not None:
        run.rows_of(raw)
    base = run.save()
    run.step = 1
    chosen = torch.randperm(rows)[:touched]
    if ids is not None:
        new = shift_right(splitmix64(torch.arange(rows, rows + touched // 10)), 1)
        chosen = run.rows_of(torch.cat([raw[chosen[touched // 10 :]], new]))
    run.touch(chosen)
    touched = len(chosen)
    checkpoint = run.save()
    size = sum(tensor.nbytes for tensor in run.tensors.values())
    changed = sum(tensor[0].nbytes for tensor in run.tensors.values()) * touched
    kind = "dense ids" if eviction is None else f"dynamic ids, {eviction}"
    print(f"{describe('cpu')}. {rows:,} rows x {dim}, {kind}, {size / 1e9:.2f} GB with states, {touched:,} touched\n")
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
    deleted = sum(read_manifest(folder / "deltas/000001").deleted.values())
    print(f"delta: {written:,} bytes, {written / changed:.3f} of the touched rows; {deleted:,} ids deleted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="Measure one delta of a table of so many rows.")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--touched", type=int, default=10_000)
    parser.add_argument("--dynamic", choices=("lru", "lfu"), help="With --rows: a table of dynamic ids.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        if options.rows:
            measure(options.rows, options.dim, options.touched, options.dynamic, Path(parent))
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

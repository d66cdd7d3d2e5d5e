"""The table of raw ids: uses a CPU-second, bytes a row, and how near its hit rate is to that of an undivided LRU cache.

    OMP_NUM_THREADS=1 python -m benchmarks.id_table --rows 10000000 --uses 1000000 100000

A use counts from raw ids to rows: distinct ids are counted, looked up, admitted and evicted, and rows are dealt out
again. The stream is a catalogue that moves: an id of age a is used in proportion to 1 / (a + 1), and --new ids are
born each step. Hit rates are of --steps steps on --small rows.
"""

import argparse
import math
import time
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.machine import describe
from gr.dist import World, use_cpu_well
from gr.ops.backend import Backend, force_backend
from gr.ops.id_table import EMPTY, IdTable, count_ids, id_table_step
from gr.ops.splitmix64 import shift_right, splitmix64


def moving(ids: int, uses: int, new: int, steps: int) -> Iterator[Tensor]:
    """Raw ids of each step, of the `ids` newest ones of a catalogue."""
    random = torch.Generator().manual_seed(0)
    for step in range(steps):
        spread = torch.rand(uses, generator=random, dtype=torch.float64) * math.log(ids + 1)
        yield shift_right(splitmix64(ids + step * new - (spread.exp().long() - 1)), 1)


def new_table(rows: int, ways: int, eviction: str, counted: bool = False) -> IdTable:
    sets = rows // ways
    score = torch.int32 if eviction == "lru" else torch.float32
    return IdTable.empty(0, sets, sets, ways, score, counted=counted)


def use(table: IdTable, ids_T: Tensor, step: int, min_count: int = 1) -> Tensor:
    """The row of each id; under LFU a use counts half after 16 steps."""
    ids_U, uses_U, place_T = count_ids(ids_T)
    stamp = step + 1 if table.score_SA.dtype == torch.int32 else 2.0 ** (step / 16)
    return id_table_step(table, ids_U, uses_U, stamp, min_count).row_U.gather(0, place_T)


def rate(rows: int, ways: int, eviction: str, uses: int, rounds: int, backend: Backend) -> float:
    """Millions of uses a CPU-second, the best of `rounds` steps on a table that is full; others only slow one down."""
    table, best = new_table(rows, ways, eviction), 0.0
    with force_backend("native"):
        for first in range(0, 2 * rows, 1 << 20):
            use(table, shift_right(splitmix64(torch.arange(first, min(first + (1 << 20), 2 * rows))), 1), 0)
    full = float((table.key_SA != EMPTY).float().mean())
    assert full > 0.9, f"the table is {full:.0%} full"
    with force_backend(backend):
        for step, ids_T in enumerate(moving(2 * rows, uses, uses // 100, rounds)):
            began = time.process_time()
            use(table, ids_T, step + 1)
            best = max(best, uses / (time.process_time() - began) / 1e6)
    return best


def hit_rates(rows: int, ways: int, uses: int, steps: int) -> dict[str, float]:
    """Of all uses of the second half of a stream, by policy; `fully associative` is LRU over all rows."""
    policies = {"lru": ("lru", 1), "lfu": ("lfu", 1), "lru, min_count 2": ("lru", 2)}
    tables = {name: new_table(rows, ways, kind, count > 1) for name, (kind, count) in policies.items()}
    cache: OrderedDict[int, None] = OrderedDict()
    hits = dict.fromkeys(["fully associative", *tables, "hashed: last trained by another id"], 0)
    last_id = torch.full((rows,), EMPTY)
    counted = 0
    for step, ids_T in enumerate(moving(4 * rows, uses, rows // 100, steps)):
        ids_U, uses_U, _ = count_ids(ids_T)
        counts = step >= steps // 2
        counted += int(uses_U.sum()) * counts
        known = torch.tensor([raw in cache for raw in ids_U.tolist()])
        hits["fully associative"] += int(uses_U[known].sum()) * counts
        for raw in ids_U.tolist():
            cache[raw] = None
            cache.move_to_end(raw)
        while len(cache) > rows:
            cache.popitem(last=False)
        for name, table in tables.items():
            had = id_table_step(table, ids_U, torch.zeros_like(uses_U), 1.0).row_U % ways != 0
            hits[name] += int(uses_U[had].sum()) * counts
            use(table, ids_T, step, policies[name][1])
        row_U = shift_right(splitmix64(ids_U), 1) % rows
        hits["hashed: last trained by another id"] += int(uses_U[last_id[row_U] != ids_U].sum()) * counts
        last_id[row_U] = ids_U
    return {name: count / counted for name, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ways", type=int, default=64)
    parser.add_argument("--uses", type=int, nargs="+", default=[1_000_000, 100_000])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--small", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    use_cpu_well(World(0, 1, 0, 1, torch.device("cpu")))  # as a run does: freed memory is kept
    torch.set_num_threads(1)
    print(f"{describe('cpu')}. {options.rows:,} rows of {options.ways} ways\n")
    print("| eviction | uses a step | million uses a CPU-second, C++ | plain torch |\n|---|---|---|---|")
    for eviction in ("lru", "lfu"):
        for uses in options.uses:
            rates = [
                rate(options.rows, options.ways, eviction, uses, rounds, backend)
                for backend, rounds in (("native", options.rounds), ("torch", 2))
            ]
            print(f"| {eviction} | {uses:,} | {rates[0]:.1f} | {rates[1]:.2f} |", flush=True)
    for counted in (False, True):
        table = new_table(options.small, options.ways, "lru", counted)
        tensors = (table.key_SA, table.score_SA, table.tag_SA, table.seen_SC)
        size = sum(each.nbytes for each in tensors if each is not None)
        print(f"\nmin_count {1 + counted}: {size / options.small:g} bytes a row", end="")
    print(f"\n\n| {options.small:,} rows | share of uses |\n|---|---|")
    for name, share in hit_rates(options.small, options.ways, options.small // 2, options.steps).items():
        print(f"| {name} | {share:.4f} |")


if __name__ == "__main__":
    main()

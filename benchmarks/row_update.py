"""CPU seconds of a table's step by its number of rows, beside the dense update that CPU runs had before.

    OMP_NUM_THREADS=1 python -m benchmarks.row_update --rows 10000 100000 1000000 10000000 --ids 100000
    OMP_NUM_THREADS=1 python -m benchmarks.row_update --whole-step

A step is the lookup of --ids ids, drawn from --distinct random rows, its backward and the update. The dense update (a
gradient as large as the table, and every row moved) is measured on a million rows at most, and goes over them as often
as a larger table has them: its memory traffic is the same, and memory bounds it.

--whole-step: of all of a training step of configs/retrieval/smoke.yaml instead, on a catalogue of each number of rows,
with 16 negatives for each position and with 1,024 shared ones: 8 examples of 64 events, a few thousand distinct rows.
Up to 65,536 items, negatives for each position look all items up (SMALL_CORPUS), and draw their places alone.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.retrieval import alone, do_step, first_batches, training
from gr.config import load_config
from gr.config.optim import TABLE_OPTIMIZERS
from gr.dist import use_cpu_well
from gr.ops.huge_pages import take_huge_pages
from gr.ops.row_update import StochasticRounding, row_update
from gr.ops.row_update.reference import adam
from gr.prepare.synthetic import StreamOptions, write_stream
from gr.recipes.base import open_recipe

BLOCK = 1_000_000
NEGATIVES = {"per position": "{kind: per_position, count: 16}", "shared": "{kind: shared, count: 1024}"}
SMALL_PAGES = "--small-pages" in sys.argv


def cpu_seconds(step: Callable[[int], None], rounds: int) -> float:
    """The least of `rounds` calls, after two that are not counted: others on the machine only ever slow one down."""
    taken = []
    for i in range(rounds + 2):
        began = time.process_time()
        step(i)
        taken.append(time.process_time() - began)
    return min(taken[2:])


def states_of(kind: str, rows: int, dim: int) -> dict[str, Tensor]:
    states = TABLE_OPTIMIZERS.config(kind).states
    return {name: zeros((rows, dim) if shape == "element" else (rows,)) for name, shape in states.items()}


def zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """As gr.embeddings holds tables and states."""
    tensor = torch.zeros(shape, dtype=dtype)
    if not SMALL_PAGES:
        take_huge_pages(tensor)
    return tensor


def own_step(kind: str, dtype: torch.dtype, ids_T: Tensor, gradient_TD: Tensor, rows: int) -> Callable[[int], None]:
    """Lookup and update of a table; its backward is a copy of the gradient."""
    config = TABLE_OPTIMIZERS.config(kind)()
    rule, numbers = TABLE_OPTIMIZERS.target(config), config.fused_arguments()
    dim = gradient_TD.shape[1]
    weight_ED, states = zeros((rows, dim), dtype), states_of(kind, rows, dim)

    def step(i: int) -> None:
        weight_ED.index_select(0, ids_T).float()
        rounding = None if dtype == torch.float32 else StochasticRounding(1, i, 0, 0, dim)
        row_update(rule, weight_ED, states, ids_T, gradient_TD.clone(), rounding, lr=1e-3, steps=i + 1, **numbers)

    return step


def dense_step(ids_T: Tensor, gradient_TD: Tensor, rows: int) -> Callable[[int], None]:
    """Adam on every row, as before rows were updated by id."""
    block, dim = min(rows, BLOCK), gradient_TD.shape[1]
    weight_ED, states, inside_T = torch.zeros(block, dim), states_of("adam", block, dim), ids_T % block

    def step(i: int) -> None:
        for first in range(0, rows, block):
            gradient_ED = torch.zeros(block, dim)
            if not first:
                gradient_ED.index_add_(0, inside_T, gradient_TD)
            adam(weight_ED, gradient_ED, states, lr=1e-3, steps=i + 1, eps=1e-8, beta1=0.9, beta2=0.98)

    return step


def whole_steps(kind: str, folder: Path, rounds: int) -> Iterator[tuple[str, float]]:
    """(negatives, CPU seconds of a training step) under one optimizer of the table, on the stream of a folder."""
    here = alone("cpu")
    use_cpu_well(here)
    given = [
        f"data.path={folder}/train",
        f"evaluation.path={folder}/test",
        "model.dim=16",
        "trainer.global_batch_size=8",
    ]
    given.append(f"embeddings.optimizer={{kind: {kind}, lr: 0.001}}")
    module = None
    for name, negatives in NEGATIVES.items():
        config = load_config("configs/retrieval/smoke.yaml", [*given, f"task.negatives={negatives}"])
        if module is None:  # a table of 10 million rows takes 10 seconds to fill
            _, module = training(config, here)
        module.objective = open_recipe(config).objective(here)
        batches = first_batches(config, here, 8)
        yield name, cpu_seconds(lambda i, m=module, b=batches: do_step(m, b[i % 8], i), rounds)  # type: ignore[misc]


def whole_step_table(all_rows: list[int], rounds: int) -> None:
    taken: dict[tuple[str, str], list[float]] = {}
    for rows in all_rows:
        with tempfile.TemporaryDirectory(prefix="gr-rows-") as folder:
            write_stream(StreamOptions(items=rows - 1, records=400, length=64), Path(folder))
            for kind in TABLE_OPTIMIZERS:
                for negatives, seconds in whole_steps(kind, Path(folder), rounds):
                    taken.setdefault((kind, negatives), []).append(1e3 * seconds)
                    print(rows, kind, negatives, f"{1e3 * seconds:.2f}", file=sys.stderr, flush=True)
                gc.collect()  # of a model that has cycles
    for (kind, negatives), ms in taken.items():
        print(f"| {kind}, {negatives} | {' | '.join(f'{each:.2f}' for each in ms)} | {max(ms) / min(ms):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--ids", type=int, default=100_000)
    parser.add_argument("--distinct", type=int, default=8_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small-pages", action="store_true", help="leave tables in pages of 4 kB")
    parser.add_argument("--whole-step", action="store_true")
    options = parser.parse_args()
    if options.whole_step:
        torch.set_num_threads(1)
        print(f"{describe('cpu')}. CPU ms of a training step\n")
        print(f"| optimizer, negatives | {' | '.join(f'{rows:,} rows' for rows in options.rows)} | most / least |")
        print("|---" * (len(options.rows) + 2) + "|")
        return whole_step_table(options.rows, options.rounds)
    random = torch.Generator().manual_seed(0)
    gradient_TD = torch.randn(options.ids, options.dim, generator=random)
    print(
        f"{describe('cpu')}. CPU ms a step: {options.ids:,} ids of {options.distinct:,} rows, {options.dim} columns\n"
    )
    print(f"| optimizer | {' | '.join(f'{rows:,} rows' for rows in options.rows)} | last / first |")
    print("|---" * (len(options.rows) + 2) + "|")
    variants = [*((kind, torch.float32) for kind in TABLE_OPTIMIZERS), ("rowwise_adamw", torch.float16)]
    for kind, dtype in [*variants, ("dense adam", torch.float32)]:
        taken = []
        for rows in options.rows:
            read = torch.randperm(rows, generator=random)[: options.distinct]
            ids_T = read[torch.randint(0, options.distinct, (options.ids,), generator=random)]
            dense = kind == "dense adam"
            step = dense_step(ids_T, gradient_TD, rows) if dense else own_step(kind, dtype, ids_T, gradient_TD, rows)
            taken.append(1e3 * cpu_seconds(step, 1 if dense else options.rounds))
        name = kind if dtype == torch.float32 else f"{kind}, fp16, stochastic rounding"
        print(f"| {name} | {' | '.join(f'{ms:.1f}' for ms in taken)} | {taken[-1] / taken[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""One training step of DLRM through TorchRec and fbgemm against the same model written plainly in PyTorch.

    python -m benchmarks.dlrm [--rows 100000] [--shape 2048x1] [--shape 512x20]

26 tables of 100,000 rows x 64, 13 dense features, bottom MLP 512-256-64, dot products, top MLP 512-256-1. A shape is
examples a batch x ids a bag. The plain model is torch.nn.EmbeddingBag(sparse=True) and nn.Linear. gr's tables have SGD,
or row-wise Adagrad, which PyTorch has not; its dense parameters have AdamW, so the plain model is also timed with that.
The MLPs alone are the limit: their forward and backward passes and AdamW, with the tables and the products for nothing.
That gr and the plain model train alike is checked first: the same weights, optimizers and batches. World size 1, fp32,
one thread, CPU time, in turns.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from benchmarks.compare import compare, print_machine, report
from gr.batch import TabularBatch
from gr.config.click import ClickConfig
from gr.dist import World, world
from gr.experiment import build
from gr.recipes.base import open_recipe
from gr.recipes.click import ClickObjective
from gr.schema import DenseTransform, SourceRows, SparseColumn, TabularSchema
from gr.training.module import TrainModule

TABLES, DENSE, DIM = 26, 13, 64
BOTTOM, TOP = (512, 256, DIM), (512, 256, 1)
BATCHES = 8
LR = 0.1
PLAIN = "EmbeddingBag(sparse) + SGD"


class Plain(nn.Module):
    """DLRM as one would write it. Dense parameters have gr's names."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum", sparse=True) for _ in range(TABLES))
        self.bottom = _layers(DENSE, BOTTOM)
        self.top = _layers(DIM + TABLES * (TABLES + 1) // 2, TOP)[:-1]
        self.pairs = torch.triu_indices(TABLES + 1, TABLES + 1, offset=1)

    def forward(self, dense_BN: Tensor, ids: list[Tensor], offsets_B: Tensor) -> Tensor:
        x_BD = self.bottom(dense_BN)
        pooled = [bag(values, offsets_B) for bag, values in zip(self.tables, ids, strict=True)]
        vectors_BTD = torch.stack([x_BD, *pooled], dim=1)
        products_BTT = torch.bmm(vectors_BTD, vectors_BTD.transpose(1, 2))
        row, column = self.pairs
        return self.top(torch.cat([x_BD, products_BTT[:, row, column]], dim=1)).squeeze(1)


def _layers(width: int, widths: tuple[int, ...]) -> nn.Sequential:
    steps: list[nn.Module] = []
    for out in widths:
        steps += [nn.Linear(width, out), nn.ReLU()]
        width = out
    return nn.Sequential(*steps)


class Step:
    """A training step of one variant; keeps the CPU seconds of its stages."""

    def __init__(self, forward: Callable[[TabularBatch], Tensor], update: Callable[[], None]) -> None:
        self.forward, self.update = forward, update
        self.stages: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}

    def run(self, batch: TabularBatch) -> float:
        marks = [time.process_time()]
        loss = self.forward(batch)
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        self.update()
        marks.append(time.process_time())
        for name, (start, end) in zip(self.stages, itertools.pairwise(marks), strict=True):
            self.stages[name].append(end - start)
        return float(loss.detach())


@dataclass(frozen=True)
class Ours:
    module: TrainModule
    step: Step


@dataclass(frozen=True)
class Shape:
    """rows: of each table. batch: examples of a step. ids: in each bag."""

    rows: int
    batch: int
    ids: int


def ours(kind: str, shape: Shape, here: World, folder: str) -> Ours:
    """gr's model, planned and sharded as `gr train` does. kind: the tables' optimizer.

    folder: gets the schema of the rows, which are made as they are needed.
    """
    config = ClickConfig.model_validate(
        {
            "run_dir": "unused",
            "device": "cpu",
            "data": {"path": folder},
            "model": {"dim": DIM, "bottom": BOTTOM, "top": TOP},
            "task": {"kind": "click"},
            "embeddings": {"init": "uniform_rows", "optimizer": {"kind": kind, "lr": LR}},
            "trainer": {"steps": 1, "global_batch_size": shape.batch},
        }
    )
    schema = TabularSchema(
        format_version=1,
        kind="tabular",
        name="generated",
        labels=["label"],
        dense=[f"i{n}" for n in range(DENSE)],
        transform=DenseTransform(name="log1p_clip", version=1),
        sparse=[SparseColumn(name=f"c{n}", cardinality=shape.rows, hots=shape.ids) for n in range(TABLES)],
        rows=shape.batch,
        threshold=1,
        files=[SourceRows(name="generated", rows=shape.batch, minimum=0)],
        source="benchmarks",
    )
    schema.save(folder)
    built = build(open_recipe(config), here)
    assert built.plan is not None, "it has tables"
    kinds = sorted({f"{placement.sharding_type} ({placement.kernel})" for placement in built.plan.placements})
    print(f"gr's plan for {kind}: {', '.join(kinds)}")
    module = TrainModule(built.model, ClickObjective(config.task.loss), config, here)

    def update() -> None:
        module.dense_optimizer.step()
        module.dense_optimizer.zero_grad()
        module.table_optimizer.step()

    return Ours(module, Step(lambda batch: module.forward(module.prepare(batch, 0)).loss, update))


def plain(model: Plain, dense: type[torch.optim.Optimizer]) -> Step:
    """dense: SGD, or AdamW with gr's settings."""
    others = [p for name, p in model.named_parameters() if not name.startswith("tables")]
    if dense is torch.optim.SGD:
        over: torch.optim.Optimizer = torch.optim.SGD(others, lr=LR)
    else:
        over = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    optimizers = [torch.optim.SGD(model.tables.parameters(), lr=LR), over]
    inputs: dict[int, tuple[list[Tensor], Tensor]] = {}

    def forward(batch: TabularBatch) -> Tensor:
        size = len(batch.labels_B)
        if id(batch) not in inputs:
            values = batch.sparse.values().split(batch.sparse.length_per_key())
            hots = len(values[0]) // size
            inputs[id(batch)] = (list(values), torch.arange(0, size * hots, hots))
        return F.binary_cross_entropy_with_logits(model(batch.dense_BN, *inputs[id(batch)]), batch.labels_B)

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return Step(forward, update)


def copied(source: Ours, rows: int) -> Plain:
    """The plain model with gr's present weights."""
    model = Plain(rows)
    with torch.no_grad():
        for shard in source.module.table_optimizer.shards:
            height, width = shard.weight.shape
            weight = model.get_parameter(f"tables.{shard.table.removeprefix('c')}.weight")
            row, column = shard.row_offset, shard.column_offset
            weight[row : row + height, column : column + width] = shard.weight
        for name, parameter in source.module.dense.items():
            model.get_parameter(name).copy_(parameter)
    return model


def mlps_alone(model: Plain, size: int) -> Step:
    """The passes of both MLPs and AdamW: what a step costs whose tables and products are free."""
    mlps = nn.ModuleList([model.bottom, model.top])
    optimizer = torch.optim.AdamW(mlps.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    pairs = torch.randn(size, TABLES * (TABLES + 1) // 2, requires_grad=True)

    def forward(batch: TabularBatch) -> Tensor:
        logits_B = model.top(torch.cat([model.bottom(batch.dense_BN), pairs], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits_B, batch.labels_B)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        pairs.grad = None

    return Step(forward, update)


def random_batch(shape: Shape, number: int) -> TabularBatch:
    """Ids drawn evenly from all rows."""
    random = torch.Generator().manual_seed(number)
    bags = TABLES * shape.batch
    return TabularBatch(
        dense_BN=torch.randn(shape.batch, DENSE, generator=random),
        sparse=KeyedJaggedTensor(
            keys=[f"c{n}" for n in range(TABLES)],
            values=torch.randint(0, shape.rows, (bags * shape.ids,), generator=random),
            lengths=torch.full((bags,), shape.ids),
            stride=shape.batch,
        ),
        labels_B=torch.randint(0, 2, (shape.batch,), generator=random).float(),
        first_example=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dlrm")
    parser.add_argument("--rows", type=int, default=100_000, help="Of each table.")
    parser.add_argument("--shape", action="append", help="Examples a batch x ids a bag; several are run in turn.")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    print(", ".join(f"{name} {version(name)}" for name in ("torchrec", "fbgemm-gpu-cpu")))
    with world("cpu") as here:
        for text in arguments.shape or ["2048x1"]:
            batch, ids = (int(part) for part in text.split("x"))
            _run(Shape(arguments.rows, batch, ids), arguments.rounds, here)


def _run(shape: Shape, rounds: int, here: World) -> None:
    batches = [random_batch(shape, number) for number in range(BATCHES)]
    with TemporaryDirectory() as folder:
        sgd, adagrad = (ours(kind, shape, here, folder) for kind in ("sgd", "rowwise_adagrad"))
        model = copied(sgd, shape.rows)
        adamw = plain(model, torch.optim.AdamW)
        _print_difference(sgd.step, adamw, batches)
        steps = {
            PLAIN: plain(model, torch.optim.SGD),
            "EmbeddingBag(sparse) + SGD, AdamW": adamw,
            "gr, SGD, AdamW": sgd.step,
            "gr, row-wise Adagrad, AdamW": adagrad.step,
            "the MLPs alone": mlps_alone(copied(sgd, shape.rows), shape.batch),
        }
        numbers = {name: itertools.cycle(batches) for name in steps}
        variants = {name: partial(_next, step, numbers[name]) for name, step in steps.items()}
        timings = compare(variants, rounds=rounds, round_seconds=0.5)
    title = f"training step, {TABLES} tables of {shape.rows} x {DIM}, batch {shape.batch}, {shape.ids} ids a bag"
    report(title, timings, baseline=PLAIN)
    print("\nits stages, ms (gr's fused table update is part of backward)")
    for name, step in steps.items():
        shown = "  ".join(f"{stage} {median(seconds) * 1e3:7.1f}" for stage, seconds in step.stages.items())
        print(f"  {name:34s} {shown}  {shape.batch / timings[name].median:9.0f} examples per CPU second", flush=True)


def _next(step: Step, batches: Iterator[TabularBatch]) -> None:
    step.run(next(batches))


def _print_difference(a: Step, b: Step, batches: list[TabularBatch]) -> None:
    """The two train as one: the same weights, optimizers and batches, which come twice so that updates are read."""
    apart = [abs(a.run(batch) - b.run(batch)) for batch in 2 * batches]
    first, most = apart[0], max(apart)
    print(f"losses of gr and of the plain model differ by {first:.1e} in step 1, {most:.1e} at most in {len(apart)}")


if __name__ == "__main__":
    main()

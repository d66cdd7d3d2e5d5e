"""Click models on a catalogue that moves: dynamic ids beside hashed ids of as many rows, each row scored before it is
trained on.

    OMP_NUM_THREADS=1 python -m benchmarks.moving_catalogue --seeds 1 2 3 --out /tmp/moving

The stream, all of it from a seed: --born items are born each day and live --life days; an item of age a days is seen
in proportion to exp(-2 a / life) times its own popularity (1 / rank, at random). Users are --users, drawn evenly. The
logit is -1.2 + w_item + u_user . v_item, all normal, of standard deviation 0.8 and, of the product, 1. Raw ids are
63-bit hashes.

One pass in the order of time; metrics are of the second half. `new items`: rows of items born that day or the day
before. NE is the log loss over the entropy of the base rate (1 is to know nothing); the floor is that of the true
probabilities. `dense` has a row for every item that is ever born, so it is what unbounded memory gives.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.machine import describe
from gr.config.click import ClickConfig
from gr.dist import use_cpu_well, world
from gr.experiment import train
from gr.ops.splitmix64 import shift_right, splitmix64
from gr.schema import RAW_IDS, DenseTransform, SourceRows, SparseColumn, TabularSchema
from gr.training.trainer import Callback, StepResult, Trainer

BATCH, WIDTH = 512, 4


@dataclass(frozen=True)
class Stream:
    """Rows in the order of time. item_B: by birth, from 1. age_B: whole days since the item was born."""

    user_B: np.ndarray
    item_B: np.ndarray
    age_B: np.ndarray
    probability_B: np.ndarray
    label_B: np.ndarray


def draw(options: argparse.Namespace, seed: int) -> Stream:
    random = np.random.default_rng(seed)
    born, life, days = options.born, options.life, options.days
    items = born * (days + life)
    popularity_E = 1.0 / (random.permutation(born * 64) + 1)[np.arange(items) % (born * 64)]
    w_E, v_EK = random.normal(0, 0.8, items), random.normal(size=(items, WIDTH))
    u_UK = random.normal(0, 1 / math.sqrt(WIDTH), (options.users, WIDTH))
    parts = []
    for day in range(days):
        alive_L = np.arange(day * born, (day + life) * born)  # the newest are born this day
        age_L = (alive_L[-1] - alive_L) // born
        weight_L = popularity_E[alive_L] * np.exp(-2 * age_L / life)
        chosen = random.choice(len(alive_L), options.rows, p=weight_L / weight_L.sum())
        user_B = random.integers(0, options.users, options.rows)
        item_B = alive_L[chosen]
        logit_B = -1.2 + w_E[item_B] + (u_UK[user_B] * v_EK[item_B]).sum(1)
        probability_B = 1 / (1 + np.exp(-logit_B))
        label_B = random.random(options.rows) < probability_B
        parts.append((user_B, item_B + 1, age_L[chosen], probability_B, label_B))
    return Stream(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def write(stream: Stream, folder: Path, columns: list[SparseColumn]) -> Path:
    """A tabular folder; a column whose cardinality is RAW_IDS gets raw ids."""
    arrays: dict[str, np.ndarray] = {
        "label": stream.label_B.astype(np.float32),
        "noise": np.zeros(len(stream.label_B), dtype=np.float32),
    }
    for column, ids in zip(columns, (stream.user_B, stream.item_B), strict=True):
        raw = column.cardinality == RAW_IDS
        arrays[column.name] = shift_right(splitmix64(torch.from_numpy(ids)), 1).numpy() if raw else ids
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), folder / "part-00000.parquet", row_group_size=1 << 14)
    TabularSchema(
        format_version=1,
        kind="tabular",
        name="moving catalogue",
        labels=["label"],
        dense=["noise"],
        transform=DenseTransform(name="none", version=1),
        sparse=columns,
        rows=len(stream.label_B),
        threshold=1,
        files=[SourceRows(name="generated", rows=len(stream.label_B), minimum=0)],
        source=__doc__,
    ).save(folder)
    return folder


class Scores(Callback):
    """Keeps the logits of every row, each from before the model was trained on it."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self.logits.append(trainer.module.objective.scored[0].clone())


def scores(data: Path, run_dir: Path, ids: dict | None, seed: int) -> np.ndarray:
    """The probability of each row that was trained on."""
    tables = {} if ids is None else {"user": {"ids": {**ids, "rows": 1 << 14}}, "item": {"ids": ids}}
    config = ClickConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "seed": seed,
            "device": "cpu",
            "data": {"path": str(data)},
            "model": {"dim": 8, "bottom": [8, 8], "top": [32, 1]},
            "task": {"kind": "click"},
            "embeddings": {"init_std": 0.01, "optimizer": {"kind": "adagrad", "lr": 0.1}, "tables": tables},
            "optimizer": {"kind": "adamw", "lr": 0.002},
            "trainer": {"epochs": 1, "global_batch_size": BATCH, "log_every": 1000, "writers": []},
            "checkpoint": {"every": None},
        }
    )
    kept = Scores()
    with world("cpu") as alone:
        use_cpu_well(alone)
        train(config, alone, callbacks=[kept])
    return torch.cat(kept.logits).double().sigmoid().numpy()


def normalized_entropy(probability_B: np.ndarray, label_B: np.ndarray) -> float:
    p, base = np.clip(probability_B, 1e-12, 1 - 1e-12), label_B.mean()
    loss = -np.where(label_B, np.log(p), np.log1p(-p)).mean()
    return float(loss / -(base * math.log(base) + (1 - base) * math.log1p(-base)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--days", type=int, default=40)
    parser.add_argument("--rows", type=int, default=12_800, help="a day")
    parser.add_argument("--born", type=int, default=256, help="items a day")
    parser.add_argument("--life", type=int, default=16, help="days")
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--table", type=int, default=4_096, help="rows of the item table; as many items are alive")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    dynamic = {"kind": "dynamic", "rows": options.table, "ways": 64}
    variants: dict[str, dict | None] = {
        "hashed": {"kind": "hashed", "rows": options.table},
        "dynamic, lru": dynamic,
        "dynamic, lfu": {**dynamic, "eviction": "lfu", "half_life": 100},
        "dynamic, lru, min_count 2": {**dynamic, "min_count": 2},
        "dense": None,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("floor", *variants)}
    for seed in options.seeds:
        stream = draw(options, seed)
        raw = [SparseColumn(name=name, cardinality=RAW_IDS) for name in ("user", "item")]
        sizes = (options.users, int(stream.item_B.max()) + 1)
        known = [SparseColumn(name=c.name, cardinality=size) for c, size in zip(raw, sizes, strict=True)]
        raw_folder = write(stream, options.out / f"raw-{seed}", raw)
        known_folder = write(stream, options.out / f"known-{seed}", known)
        rows = len(stream.label_B) // BATCH * BATCH
        later_B = np.arange(len(stream.label_B)) >= len(stream.label_B) // 2
        later_B[rows:] = False
        parts = (later_B, later_B & (stream.age_B <= 1))
        found["floor"].append(tuple(normalized_entropy(stream.probability_B[p], stream.label_B[p]) for p in parts))
        for name, ids in variants.items():
            run_dir = options.out / f"run-{seed}-{name.replace(', ', '-').replace(' ', '-')}"
            score_B = np.zeros(len(stream.label_B))
            score_B[:rows] = scores(raw_folder if ids else known_folder, run_dir, ids, seed)
            found[name].append(tuple(normalized_entropy(score_B[p], stream.label_B[p]) for p in parts))
            print(seed, name, *(f"{value:.4f}" for value in found[name][-1]), flush=True)
    print(f"\n{describe('cpu')}. {options}\n")
    print("| ids | NE, all rows | NE, new items |\n|---|---|---|")
    for name, values in found.items():
        cells = []
        for column in zip(*values, strict=True):
            cells.append(f"{np.mean(column):.4f} ({min(column):.4f} to {max(column):.4f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

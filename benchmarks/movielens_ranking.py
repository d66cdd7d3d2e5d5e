"""Generative ranking on MovieLens beside models without history, on the same predictions.

    python -m benchmarks.movielens_ranking --data data/ml-100k [--seeds 1 2 3] [KEY=VALUE ...]

Each model predicts the ten newest ratings of every user (4 stars or more?); the ten before them choose its checkpoint,
or number of passes; the older ones are trained on (by hstu data.max_length of each user). item mean and user + item are
counts, smoothed towards the mean label; dlrm reads the user, the film, hour and weekday
(configs/ranking/movielens-dlrm.yaml), and no history. Further arguments override configs/ranking/movielens-hstu.yaml.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from gr.data.dataset import Dataset
from gr.dist import World
from gr.metrics.ranking import RankingMetrics
from gr.schema import DenseTransform, SourceRows, SparseColumn, TabularSchema

NEWEST = 10
PASSES = (1, 2, 4)
ACTION = "rating_ge_4"
SHOWN = ("auc", "gauc", "ne", "accuracy", "base_rate")
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Ratings(NamedTuple):
    """user, item, label, hour, weekday of each event; from_end: 0 for a user's newest."""

    user: np.ndarray
    item: np.ndarray
    label: np.ndarray
    hour: np.ndarray
    weekday: np.ndarray
    from_end: np.ndarray

    def part(self, name: str) -> "Ratings":
        low, high = {"test": (0, NEWEST), "validation": (NEWEST, 2 * NEWEST), "train": (2 * NEWEST, 1 << 60)}[name]
        chosen = (self.from_end >= low) & (self.from_end < high)
        return Ratings(*(column[chosen] for column in self))


def read(dataset: Dataset) -> Ratings:
    parts = []
    for group in range(len(dataset.row_groups)):
        rows = dataset.read_row_group(group, ["user_id", "actions", "timestamps"])
        lengths = rows.lengths_B
        hours = rows.columns["timestamps"] // 3600
        parts.append(
            (
                np.repeat(rows.columns["user_id"], lengths),
                rows.columns["item_ids"],
                rows.columns["actions"] >> dataset.schema.actions.index(ACTION) & 1,
                hours % 24,
                hours // 24 % 7,
                np.repeat(rows.offsets[1:], lengths) - 1 - np.arange(int(rows.offsets[-1])),
            )
        )
    return Ratings(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def smoothed(ids: np.ndarray, residual: np.ndarray, size: int, weight: float) -> np.ndarray:
    """Mean residual of each id, as if `weight` more had none."""
    return np.bincount(ids, residual, size) / (np.bincount(ids, minlength=size) + weight)


def metrics(probability: np.ndarray, test: Ratings) -> dict[str, float]:
    found = RankingMetrics("test", ALONE, predictions="probabilities", grouped=True)
    found.update(*(torch.from_numpy(column) for column in (probability, test.label)), None, torch.from_numpy(test.user))
    return found.compute()


def counted(train: Ratings, test: Ratings, *, users: bool) -> dict[str, float]:
    """Mean label of the film, and with `users` of the user beside it, each smoothed by ten mean labels."""
    base = train.label.mean()
    item = smoothed(train.item, train.label - base, int(train.item.max()) + 1, 10.0)
    prediction = base + item[np.minimum(test.item, len(item) - 1)] * (test.item < len(item))
    if users:
        user = smoothed(train.user, train.label - base - item[train.item], int(train.user.max()) + 1, 10.0)
        prediction = prediction + user[test.user]
    return metrics(np.clip(prediction, 1e-3, 1 - 1e-3), test)


def write_rows(folder: Path, rows: Ratings, schema_rows: tuple[int, int], seed: int) -> None:
    """A tabular folder, in a random order: one pass over it is one epoch."""
    order = np.random.default_rng(seed).permutation(len(rows.user))
    folder.mkdir(parents=True)
    columns = {
        "label": rows.label.astype(np.int8),
        "hour": np.log1p(rows.hour).astype(np.float32),
        "weekday": np.log1p(rows.weekday).astype(np.float32),
        "user": rows.user.astype(np.int32),
        "item": rows.item.astype(np.int32),
    }
    pq.write_table(pa.table({name: c[order] for name, c in columns.items()}), folder / "part-00000.parquet")
    names = zip(("user", "item"), schema_rows, strict=True)
    TabularSchema(
        format_version=1,
        kind="tabular",
        name="movielens",
        labels=["label"],
        dense=["hour", "weekday"],
        transform=DenseTransform(name="log1p_clip", version=1),
        sparse=[SparseColumn(name=name, cardinality=size) for name, size in names],
        rows=len(order),
        threshold=1,
        files=[SourceRows(name="movielens", rows=len(order), minimum=0)],
        source="benchmarks.movielens_ranking",
    ).save(folder)


def train(config: str, overrides: list[str]) -> dict[str, float]:
    """`gr train`, in its own process: the metrics of its report."""
    run_dir = next(o.split("=", 1)[1] for o in overrides if o.startswith("run_dir="))
    subprocess.run([sys.executable, "-m", "gr", "train", config, *overrides], check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path(run_dir) / "report.json").read_text())["model"]


def dlrm(folder: Path, ratings: Ratings, sizes: tuple[int, int], seed: int) -> dict[str, float]:
    """The test metrics of DLRM after as many of PASSES as are best on validation."""
    train_rows = ratings.part("train")
    write_rows(folder / "validation", ratings.part("validation"), sizes, seed)
    write_rows(folder / "test", ratings.part("test"), sizes, seed)

    def scored(passes: int, part: str) -> dict[str, float]:
        overrides = [
            f"data.path={folder}/{passes}",
            f"evaluation.path={folder}/{part}",
            f"run_dir={folder}/run-{passes}-{part}",
            f"seed={seed}",
            f"trainer.steps={passes * len(train_rows.user) // 256}",
        ]
        return train("configs/ranking/movielens-dlrm.yaml", overrides)

    for passes in PASSES:
        # Passes are written out, each in an order of its own: `gr train` reads a tabular folder once.
        write_rows(folder / f"{passes}", Ratings(*(np.tile(column, passes) for column in train_rows)), sizes, seed)
    best = max(PASSES, key=lambda passes: scored(passes, "validation")["auc"])
    return scored(best, "test")


def _cell(values: list[float]) -> str:
    """Mean and standard deviation; empty where a model has no such metric (DLRM's are not by user)."""
    if not values:
        return ""
    return f"{mean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    dataset = Dataset.open(given.data)
    ratings = read(dataset)
    train_rows, test = ratings.part("train"), ratings.part("test")
    found = {
        "item mean": [counted(train_rows, test, users=False)],
        "user + item": [counted(train_rows, test, users=True)],
        "dlrm": [],
        "hstu": [],
    }
    sizes = (dataset.schema.contextual["user"], dataset.schema.item_cardinality)
    with tempfile.TemporaryDirectory() as name:
        for seed in given.seeds:
            folder = Path(name) / str(seed)
            found["dlrm"].append(dlrm(folder, ratings, sizes, seed))
            overrides = [f"data.path={given.data}", f"run_dir={folder}/hstu", f"seed={seed}", *given.overrides]
            scores = train("configs/ranking/movielens-hstu.yaml", overrides)
            found["hstu"].append({name.split("/")[1]: value for name, value in scores.items()})
            print(
                f"seed {seed}:", *(f"{model} {found[model][-1]}" for model in ("dlrm", "hstu")), sep="\n  ", flush=True
            )
    table = Table(title=f"{given.data}, {len(test.user):,} predictions, seeds {given.seeds}")
    for column in ("", *SHOWN):
        table.add_column(column)
    for model, runs in found.items():
        table.add_row(model, *(_cell([run[metric] for run in runs if metric in run]) for metric in SHOWN))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

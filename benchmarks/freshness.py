"""Seconds from an event that is trained on to an answer that it changed: train -> delta -> hot swap, in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.freshness --out /tmp/freshness

A click model trains on the stream of benchmarks.moving_catalogue, whose items are raw ids with rows of their own, and
saves a checkpoint every --every steps. At the next step the checkpoint is published into a package twice: as the
changes since the checkpoint before, and whole into a copy of the package. Both must make the same version. An engine
that serves the first package opens the version and swaps it in, and is asked the same request before and after.

The clock of an event starts when its step ends. `wait` is that of the mean event, half the steps between two
checkpoints; the newest event has none. Nothing is hidden: training stands still while the rest is done.
"""

import argparse
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe
from benchmarks.moving_catalogue import draw, write
from gr.config.click import ClickConfig
from gr.config.export import load_export_config
from gr.dist import use_cpu_well, world
from gr.experiment import train
from gr.ops.splitmix64 import shift_right, splitmix64
from gr.schema import RAW_IDS, SparseColumn
from gr.serving import Engine
from gr.serving.export import Exported, export, publish
from gr.serving.package.version import Version
from gr.training.trainer import Callback, StepResult, Trainer

STAGES = ("wait", "save", "publish, delta", "publish, whole", "open", "swap", "ask")
NEEDED = ("save", "publish, delta", "open", "swap", "ask")


class Freshness(Callback):
    """Publishes each checkpoint at the step after it, and asks. seconds, cpu: of each stage, one a checkpoint."""

    def __init__(self, run_dir: Path, every: int, request: dict[str, np.ndarray]) -> None:
        self.run_dir, self.every, self.request = run_dir, every, request
        self.package, self.whole = run_dir.parent / "package", run_dir.parent / "whole"
        self.engine: Engine | None = None
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.changes: list[float] = []
        self._ended = time.perf_counter(), time.process_time()
        self._steps: list[float] = []

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        now = time.perf_counter(), time.process_time()
        after, step = trainer.step % self.every == 1, trainer.step - 1
        if after and step >= self.every:
            # The step before ended where the save began, so this one's time counts as part of it, on the safe side.
            if self.engine is not None:
                self.seconds["save"].append(now[0] - self._ended[0])
                self.cpu["save"].append(now[1] - self._ended[1])
                self.seconds["wait"].append(self.every / 2 * statistics.median(self._steps))
            self._publish(self.run_dir / "checkpoints" / f"step-{step:08d}", step)
        elif not after:
            self._steps.append(now[0] - self._ended[0])
        self._ended = time.perf_counter(), time.process_time()

    def _publish(self, checkpoint: Path, step: int) -> None:
        if self.engine is None:
            export(checkpoint, self.package, load_export_config(["tables.dtype=int8", "gate.rows=0"]))
            shutil.copytree(self.package, self.whole)
            self.engine = Engine.open(self.package)
            return
        before = self.engine.ask("score", self.request)["score"]
        with self._stage("publish, delta"):
            delta: Exported = publish(checkpoint, self.package, since=step - self.every)
        with self._stage("publish, whole"):
            whole = publish(checkpoint, self.whole)
        assert delta.stored == whole.stored, "a delta makes the version that a whole publish makes"
        with self._stage("open"):
            version = Version.open(self.package)
        with self._stage("swap"):
            self.engine.swap(version)
        with self._stage("ask"):
            after = self.engine.ask("score", self.request)["score"]
        self.changes.append(float(np.abs(after - before).max()))
        assert self.changes[-1] > 0, "the answer has changed"

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name].append(time.perf_counter() - wall)
        self.cpu[name].append(time.process_time() - cpu)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, default=1 << 20, help="rows of the items' table")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--checkpoints", type=int, default=6, help="the first one is exported, and compiled")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(born=256, life=16, users=2000)
    options = parser.parse_args()
    options.rows = options.batch * options.every  # a day is what comes between two checkpoints
    options.days = options.checkpoints + 1
    return options


def main() -> None:
    options = _options()
    stream = draw(options, seed=1)
    columns = [SparseColumn(name=name, cardinality=RAW_IDS) for name in ("user", "item")]
    data = write(stream, options.out / "data", columns)
    newest = slice(options.rows * (options.checkpoints - 1), options.rows * options.checkpoints)
    request: dict[str, np.ndarray] = {"noise": np.zeros(64, dtype=np.float32)}
    for name, ids in (("user", stream.user_B), ("item", stream.item_B)):
        request[name] = shift_right(splitmix64(torch.from_numpy(ids[newest][:64])), 1).numpy()
    run_dir = options.out / "run"
    ids = {"kind": "dynamic", "rows": options.table}
    config = ClickConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "seed": 1,
            "device": "cpu",
            "data": {"path": str(data)},
            "model": {"dim": options.dim, "bottom": [options.dim], "top": [32, 1]},
            "task": {"kind": "click"},
            "embeddings": {
                "init_std": 0.01,
                "optimizer": {"kind": "adagrad", "lr": 0.1},
                "tables": {"user": {"ids": {"kind": "hashed", "rows": 1 << 14}}, "item": {"ids": ids}},
            },
            "optimizer": {"kind": "adamw", "lr": 0.002},
            "trainer": {
                "steps": options.every * options.checkpoints + 1,
                "global_batch_size": options.batch,
                "log_every": 1000,
                "writers": [],
            },
            "evaluation": {"every": None},
            "checkpoint": {"every": options.every, "keep_last": 3},
        }
    )
    freshness = Freshness(run_dir, options.every, request)
    with world("cpu") as alone:
        use_cpu_well(alone)
        train(config, alone, [freshness])
    assert freshness.engine is not None
    freshness.engine.close()
    _report(freshness, options)


def _report(freshness: Freshness, options: argparse.Namespace) -> None:
    print(f"{describe('cpu')}; table of {options.table:,} rows x {options.dim}, {options.every} steps a checkpoint\n")
    print("| stage | seconds | CPU-seconds |\n|---|---|---|")
    for name in STAGES:
        seconds = statistics.median(freshness.seconds[name])
        cpu = f"{statistics.median(freshness.cpu[name]):.3f}" if freshness.cpu[name] else ""
        print(f"| {name} | {seconds:.3f} | {cpu} |")
    needed = [sum(parts) for parts in zip(*(freshness.seconds[name] for name in NEEDED), strict=True)]
    print(f"\nFrom the newest event to a changed answer: {statistics.median(needed):.2f} s, ", end="")
    print(f"{min(needed):.2f} to {max(needed):.2f} over {len(needed)} checkpoints; every answer changed, by ", end="")
    print(f"{min(freshness.changes):.2g} at least.")


if __name__ == "__main__":
    main()

"""A package of a click model beside its checkpoint in torchrec, one thread, one batch at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.serving PACKAGE --checkpoint RUN [--rounds 15]
    python -m benchmarks.serving PACKAGE --checkpoint RUN --gpu       # minutes; --device cpu goes the same way

Two rows of figures a batch: the pass alone on tensors, and a whole request from the columns of a log to probabilities.
Both sides answer the same rows in turns; CPU milliseconds are medians over the rounds. `gr bench` measures rates.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import gr
from benchmarks.compare import Timing, compare, cpu_model
from benchmarks.serving_device import measure
from gr.data.collate_tabular import tabular_batch
from gr.models.saved_click import SavedClick
from gr.serving.package.version import Version
from gr.serving.verbs.click import ClickServable

BATCHES = (1, 8, 64, 512)


def request(saved: SavedClick, rows: int) -> dict[str, np.ndarray]:
    """Columns of a log: dense values at random, and values that training saw."""
    random = np.random.default_rng(rows)
    columns: dict[str, np.ndarray] = {name: random.normal(size=rows).astype(np.float32) for name in saved.schema.dense}
    for column in saved.schema.sparse:
        ids = random.integers(1, column.cardinality, (rows, column.hots) if column.hots > 1 else rows)
        values = saved.vocabularies[column.name].values(ids.reshape(-1)).to_numpy(zero_copy_only=False)
        columns[column.name] = values.reshape(ids.shape)
    return columns


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the pass alone, packed and compiled for a device")
    parser.add_argument("--gpu", action="store_const", dest="device", const="cuda", help="--device cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device is not None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--gpu: torch finds no CUDA device here, so nothing was measured")
        measure(options.package, options.checkpoint, options.device, options.rounds)
        return
    saved = gr.load(options.checkpoint)
    version = Version.open(options.package)
    score = version.verbs["score"]
    assert isinstance(saved, SavedClick) and isinstance(score, ClickServable), "a click model"
    types = sorted({table.dtype for table in version.manifest.tables.values()})
    print(f"{cpu_model()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, tables {', '.join(types)}")
    print("| rows | pass: package ms | torchrec ms | ratio | request: package ms | torchrec ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    for rows in BATCHES:
        columns = request(saved, rows)
        table = pa.table({name: pa.array(list(values)) for name, values in columns.items()})
        batch = tabular_batch(saved.rows.read(table)[0], saved.schema)
        read = score.read(columns)
        inputs = torch.from_numpy(read.dense_BN), torch.from_numpy(read.ids_BH)
        timings = compare(
            {
                "pass": partial(score.compiled_pass, *inputs),
                "model": partial(saved.model, batch.dense_BN, batch.sparse),
                "request": partial(answer, score, columns),
                "saved": partial(saved.score, table),
            },
            rounds=options.rounds,
            round_seconds=0.05,
        )
        print(f"| {rows} | {_cells(timings, 'pass', 'model')} | {_cells(timings, 'request', 'saved')} |", flush=True)


def answer(score: ClickServable, columns: dict[str, np.ndarray]) -> Sequence[object]:
    """A whole request."""
    return score.run([score.encode(columns)])


def _cells(timings: dict[str, Timing], ours: str, theirs: str) -> str:
    own, other = timings[ours].median, timings[theirs].median
    return f"{1e3 * own:.3f} | {1e3 * other:.3f} | {other / own:.1f}x"


if __name__ == "__main__":
    main()

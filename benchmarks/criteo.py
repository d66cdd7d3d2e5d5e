"""DLRM after one pass over Criteo's public rows, beside logistic regression and boosting on the same rows.

    pip install 'scikit-learn>=1.9'
    python -m benchmarks.criteo FOLDER            # FOLDER: terabyte-part-0.orc to terabyte-part-6.orc
    python -m benchmarks.criteo FOLDER --test-part 0 --seed 1

Each fold trains configs/dlrm/criteo-debug.yaml on all parts but one, in file order, and tests on that one; default:
parts 4, 5 and 6, seeds 1, 2 and 3. The seed changes the initial values and nothing else. The vocabulary is that of the
training parts. One thread, ten seconds a fold.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.compare import print_machine
from benchmarks.tabular_baselines import PARTS, TEST_PARTS, Rows, concatenate, measure, read_orc
from gr.config import load_config
from gr.dist import World, world
from gr.errors import DataError
from gr.experiment import train
from gr.prepare.criteo import CriteoOptions, prepare_criteo

CONFIG = "configs/dlrm/criteo-debug.yaml"
THRESHOLD = 2  # as the configuration's first lines have it
SEEDS = (1, 2, 3)
LEAST_AUC, MOST_LOG_LOSS = 0.715, 0.1345
SHOWN = ("auc", "ne", "log_loss", "calibration", "cpu_seconds")
Values = dict[str, float]
DLRM = "DLRM"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.criteo")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test-part", type=int, action="append", choices=range(PARTS), help="Again for more; 4, 5, 6.")
    parser.add_argument("--seed", type=int, action="append", help="Again for more; 1, 2, 3.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = [arguments.folder / f"terabyte-part-{index}.orc" for index in range(PARTS)]
    try:
        parts = [read_orc(file) for file in files]
    except DataError as error:
        parser.error(str(error))
    print_machine()
    print(", ".join(f"{name} {version(name)}" for name in ("torchrec", "scikit-learn", "numpy", "pyarrow")))
    seeds = arguments.seed or SEEDS
    folds = []
    with tempfile.TemporaryDirectory(prefix="gr-criteo-") as folder, world("cpu") as here:
        for held_out in arguments.test_part or TEST_PARTS:
            fold = _baselines(parts, held_out)
            fold |= _dlrm(files, held_out, seeds, Path(folder) / str(held_out), here)
            folds.append(fold)
            _print(f"tested on part {held_out}", fold)
    _print_means(folds, seeds)


def _baselines(parts: Sequence[Rows], held_out: int) -> dict[str, Values]:
    return measure(concatenate([part for index, part in enumerate(parts) if index != held_out]), parts[held_out])


def _dlrm(files: Sequence[Path], held_out: int, seeds: Sequence[int], folder: Path, here: World) -> dict[str, Values]:
    """Metrics on files[held_out] after one pass over the others, by seed."""
    train_folder, test_folder = folder / "train", folder / "test"
    folder.mkdir()
    others = [file for index, file in enumerate(files) if index != held_out]
    prepare_criteo(others, train_folder, CriteoOptions(threshold=THRESHOLD))
    prepare_criteo([files[held_out]], test_folder, CriteoOptions(vocabulary=train_folder))
    found = {}
    for seed in seeds:
        paths = [f"data.path={train_folder}", f"evaluation.path={test_folder}", f"run_dir={folder}/{seed}"]
        config = load_config(CONFIG, [*paths, f"seed={seed}", "device=cpu"])
        started = time.process_time()
        report = train(config, here)
        if report is None:
            raise SystemExit("stopped")
        trained = config.trainer.steps * config.trainer.global_batch_size
        print(
            f"part {held_out} held out, seed {seed}: {config.trainer.steps} steps, {trained} rows, "
            f"{report['training_data']['dropped_examples']} left out"
        )
        found[f"{DLRM}, seed {seed}"] = report["model"] | {"cpu_seconds": time.process_time() - started}
    return found


def _print(title: str, rows: dict[str, Values]) -> None:
    print(f"\n{title}")
    for name, values in rows.items():
        print(f"  {name:20s}" + "  ".join(f"{metric} {values[metric]:.4f}" for metric in SHOWN if metric in values))


def _print_means(folds: Sequence[dict[str, Values]], seeds: Sequence[int]) -> None:
    """Means over folds and seeds, spreads over either, and the gates."""
    names = [f"{DLRM}, seed {seed}" for seed in seeds]
    means = {
        name: {metric: _mean([fold[name][metric] for fold in folds]) for metric in folds[0][name]} for name in folds[0]
    }
    of_dlrm = {metric: _mean([means[name][metric] for name in names]) for metric in means[names[0]]}
    _print(f"mean of {len(folds)} folds", means | {f"{DLRM}, all seeds": of_dlrm})
    print("\nstandard deviations of DLRM")
    for metric in ("auc", "ne", "log_loss"):
        scores_FS = np.array([[fold[name][metric] for name in names] for fold in folds])
        over_seeds = float(np.sqrt(scores_FS.var(axis=1, ddof=1).mean())) if len(names) > 1 else float("nan")
        over_folds = float(scores_FS.mean(axis=1).std(ddof=1)) if len(folds) > 1 else float("nan")
        print(f"  {metric:10s} over seeds of a fold {over_seeds:.4f}, over folds {over_folds:.4f}")
    print("\nDLRM less a baseline, fold by fold (mean of the seeds)")
    for name in folds[0]:
        if name not in names and "auc" in folds[0][name]:
            for metric in ("auc", "log_loss"):
                apart = [_mean([fold[seed][metric] for seed in names]) - fold[name][metric] for fold in folds]
                print(f"  {name:20s} {metric:10s}" + "  ".join(f"{value:+.4f}" for value in apart))
    passed = {True: "PASS", False: "FAIL"}
    print(f"\nAUC {of_dlrm['auc']:.4f} >= {LEAST_AUC}: {passed[of_dlrm['auc'] >= LEAST_AUC]}")
    print(f"log loss {of_dlrm['log_loss']:.4f} <= {MOST_LOG_LOSS}: {passed[of_dlrm['log_loss'] <= MOST_LOG_LOSS]}")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    main()

"""DLRM after one pass over Criteo's public rows, beside logistic regression and boosting on the same rows.

    pip install 'scikit-learn>=1.9'
    python -m benchmarks.criteo FOLDER            # FOLDER: terabyte-part-0.orc to terabyte-part-6.orc
    python -m benchmarks.criteo FOLDER --test-part 0 --seed 1
    python -m benchmarks.criteo FOLDER --rows 5000 --rows 20000 --rows 60000 --picture curve.png

Each fold trains configs/dlrm/criteo-debug.yaml on all parts but one, in file order, and tests on that one; default:
parts 4, 5 and 6, seeds 1, 2 and 3. The seed changes the initial values and nothing else. The vocabulary is that of the
training rows. --rows: so many training rows, the first of each part, for every model. --set KEY=VALUE changes the
configuration. One thread, ten seconds a fold.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.orc
import torch
from matplotlib import pyplot as plt

from benchmarks.compare import print_machine
from benchmarks.tabular_baselines import PARTS, TEST_PARTS, concatenate, measure, read_orc
from gr.config import load_config
from gr.dist import World, world
from gr.errors import DataError
from gr.experiment import train
from gr.prepare.criteo import CriteoOptions, prepare_criteo

CONFIG = "configs/dlrm/criteo-debug.yaml"
ROWS = 60_000  # that the configuration's steps are a pass over
THRESHOLD = 2  # as the configuration's first lines have it
SEEDS = (1, 2, 3)
LEAST_AUC, MOST_LOG_LOSS = 0.715, 0.1345
SHOWN = ("auc", "ne", "log_loss", "calibration", "cpu_seconds")
Values = dict[str, float]
DLRM = "DLRM"


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = [arguments.folder / f"terabyte-part-{index}.orc" for index in range(PARTS)]
    print_machine()
    print(", ".join(f"{name} {version(name)}" for name in ("torchrec", "scikit-learn", "numpy", "pyarrow")))
    seeds, changes = arguments.seed or SEEDS, arguments.set or []
    curve = {}
    with tempfile.TemporaryDirectory(prefix="gr-criteo-") as folder, world("cpu") as here:
        for rows in arguments.rows or [None]:
            folds = []
            for held_out in arguments.test_part or TEST_PARTS:
                fold = Path(folder) / f"{rows}-{held_out}"
                fold.mkdir()
                others = [file for index, file in enumerate(files) if index != held_out]
                try:
                    taken = _first_rows(others, rows, fold)
                    train, test = concatenate([read_orc(file) for file in taken]), read_orc(files[held_out])
                except DataError as error:
                    parser.error(str(error))
                folds.append(measure(train, test) | _dlrm(taken, files[held_out], seeds, fold, here, changes))
                _print(f"trained on {len(train):,} rows, tested on part {held_out}", folds[-1])
            _print_means(folds, seeds)
            curve[len(train)] = folds
    if len(curve) > 1:
        _print_curve(curve)
    if arguments.picture:
        _draw(curve, arguments.picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.criteo")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test-part", type=int, action="append", choices=range(PARTS), help="Again for more; 4, 5, 6.")
    parser.add_argument("--seed", type=int, action="append", help="Again for more; 1, 2, 3.")
    parser.add_argument("--rows", type=int, action="append", help="Training rows; again for a curve; all.")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="As after `gr train`.")
    parser.add_argument("--picture", type=Path, help="PNG of the curve.")
    return parser


def _first_rows(files: Sequence[Path], rows: int | None, folder: Path) -> list[Path]:
    """Files of the first rows of each, `rows` in all; the files themselves for None. Raises DataError."""
    if rows is None:
        return list(files)
    taken = []
    for index, file in enumerate(files):
        try:
            table = pyarrow.orc.read_table(file)
        except FileNotFoundError:
            raise DataError(f"{file} is not there; give the folder of the terabyte-part-N.orc files") from None
        count = rows * (index + 1) // len(files) - rows * index // len(files)
        if count > len(table):
            raise DataError(f"--rows {rows}: {file} has {len(table)} rows, fewer than the {count} of its share")
        taken.append(folder / file.name)
        pyarrow.orc.write_table(table.slice(0, count), taken[-1])
    return taken


def _dlrm(
    train_files: Sequence[Path], test_file: Path, seeds: Sequence[int], folder: Path, here: World, changes: list[str]
) -> dict[str, Values]:
    """Metrics on test_file after one pass over train_files, by seed."""
    train_folder, test_folder = folder / "train", folder / "test"
    rows = prepare_criteo(train_files, train_folder, CriteoOptions(threshold=THRESHOLD)).rows
    prepare_criteo([test_file], test_folder, CriteoOptions(vocabulary=train_folder))
    hold = load_config(CONFIG, changes).optimizer.schedule.hold_steps * rows // ROWS
    one_pass = ["trainer.steps=null", "trainer.epochs=1", f"optimizer.schedule.hold_steps={hold}"]
    measured = {}
    for seed in seeds:
        paths = [f"data.path={train_folder}", f"evaluation.path={test_folder}", f"run_dir={folder}/{seed}"]
        config = load_config(CONFIG, [*paths, *one_pass, f"seed={seed}", "device=cpu", *changes])
        started = time.process_time()
        report = train(config, here)
        if report is None:
            raise SystemExit("stopped")
        print(f"seed {seed}: {report['step']} steps, {report['training_data']['dropped_examples']} rows left out")
        measured[f"{DLRM}, seed {seed}"] = report["model"] | {"cpu_seconds": time.process_time() - started}
    return measured


def _print(title: str, rows: dict[str, Values]) -> None:
    print(f"\n{title}")
    for name, values in rows.items():
        print(f"  {name:28s}" + "  ".join(f"{metric} {values[metric]:.4f}" for metric in SHOWN if metric in values))


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
                print(f"  {name:28s} {metric:10s}" + "  ".join(f"{value:+.4f}" for value in apart))
    passed = {True: "PASS", False: "FAIL"}
    print(f"\nAUC {of_dlrm['auc']:.4f} >= {LEAST_AUC}: {passed[of_dlrm['auc'] >= LEAST_AUC]}")
    print(f"log loss {of_dlrm['log_loss']:.4f} <= {MOST_LOG_LOSS}: {passed[of_dlrm['log_loss'] <= MOST_LOG_LOSS]}")


def _print_curve(curve: dict[int, list[dict[str, Values]]]) -> None:
    """A row of Markdown for each number of training rows: AUC and log loss of each model."""
    names = list(_models(next(iter(curve.values()))))
    print("\n| rows | " + " | ".join(f"{name}: AUC | log loss" for name in names) + " |")
    for rows, folds in sorted(curve.items()):
        cells = [
            f"{np.mean(scores['auc']):.4f} | {np.mean(scores['log_loss']):.4f}" for scores in _models(folds).values()
        ]
        print(f"| {rows:,} | " + " | ".join(cells) + " |")


def _models(folds: Sequence[dict[str, Values]]) -> dict[str, dict[str, list[float]]]:
    """AUC and log loss of each fold, by model; of DLRM the mean of its seeds."""
    scored = [name for name, values in folds[0].items() if "auc" in values]
    models = {name: [name] for name in scored if not name.startswith(DLRM)}
    models[DLRM] = [name for name in scored if name.startswith(DLRM)]
    return {
        model: {
            metric: [_mean([fold[name][metric] for name in names]) for fold in folds] for metric in ("auc", "log_loss")
        }
        for model, names in models.items()
    }


def _draw(curve: dict[int, list[dict[str, Values]]], path: Path) -> None:
    """AUC and log loss over training rows; bars: one standard error of the mean over folds."""
    curve = dict(sorted(curve.items()))
    matplotlib.use("Agg")
    figure, panes = plt.subplots(1, 2, figsize=(11, 4))
    models = [_models(folds) for folds in curve.values()]
    for axes, metric, label in zip(panes, ("auc", "log_loss"), ("AUC", "log loss"), strict=True):
        for name in models[0]:
            scores = [each[name][metric] for each in models]
            errors = [np.std(folds, ddof=1) / np.sqrt(len(folds)) if len(folds) > 1 else 0 for folds in scores]
            axes.errorbar(list(curve), [np.mean(folds) for folds in scores], errors, marker="o", capsize=3, label=name)
        axes.set(xlabel="training rows", ylabel=f"{label} of rows kept back", xscale="log")
        axes.set_xticks(list(curve), [f"{rows:,}" for rows in curve])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    main()

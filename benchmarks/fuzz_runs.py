"""Targets of benchmarks.fuzz: configurations, the small files of a run folder, and checkpoints."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from benchmarks.fuzz import Trial, target
from benchmarks.fuzz_folders import other_json
from benchmarks.mutations import changed, damaged
from gr.checkpoint.checksums import SUMS
from gr.cli import main
from gr.config import dump_config, load_config
from gr.config.load import RECIPES

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 4


@target("configuration")
def configuration(random: np.random.Generator, folder: Path) -> Trial:
    """A configuration with all its values. What is accepted is what PyYAML and pydantic make of the same text."""
    path = str(random.choice(("dlrm/clicks", "ranking/streaming-hstu", "retrieval/smoke", "retrieval/ml-1m-sasrec")))
    text, mutation = changed(random, dump_config(load_config(CONFIGS / f"{path}.yaml")).encode(), b": ")
    file = folder / "x.yaml"
    file.write_bytes(text)

    def difference() -> str | None:
        tree = yaml.safe_load(text)
        kind = (tree.get("task") or {}).get("kind", "retrieval")
        try:
            expected = dump_config(RECIPES.config(kind).model_validate(tree))
        except ValueError as error:
            return f"accepted, though {str(error)[:300]}"
        actual = dump_config(load_config(file))
        pairs = zip(expected.splitlines(), actual.splitlines(), strict=False)
        return next((f"wanted {a!r}, is {b!r}" for a, b in pairs if a != b), None)

    return Trial(f"{path}, {mutation}", lambda: main(["config", "check", str(file)]), difference)


def train(folder: Path, run_dir: Path, steps: int) -> int:
    data = folder.parent / "data"
    return main(
        [
            *("train", str(CONFIGS / "retrieval" / "smoke.yaml"), f"run_dir={run_dir}"),
            *(f"data.path={data}/train", f"evaluation.path={data}/test", "data.max_length=8", "model.dim=8"),
            *("trainer.global_batch_size=8", "task.negatives.count=8", f"trainer.steps={steps}", "trainer.log_every=1"),
            *("checkpoint.every=2", "evaluation.every=2", "evaluation.baselines=[]"),
        ]
    )


def run_folder(folder: Path) -> Path:
    """A run of STEPS steps with two checkpoints, made once; and beside it the same run resumed for two steps more."""
    whole = folder.parent / "whole"
    if not whole.exists():
        sizes = ["--records=60", "--items=50", "--categories=5", "--length=8"]
        assert main(["prepare", "synthetic", *sizes, "--out", str(folder.parent / "data"), "--force"]) == 0
        shutil.rmtree(folder.parent / "made", ignore_errors=True)
        assert train(folder, folder.parent / "made", STEPS) == 0
        shutil.copytree(folder.parent / "made", folder.parent / "resumed", dirs_exist_ok=True)
        assert train(folder, folder.parent / "resumed", STEPS + 2) == 0
        (folder.parent / "made").rename(whole)
    return whole


def evaluate(checkpoint: Path, report: Path) -> int:
    """Writes the metrics that `gr evaluate` only prints."""
    from gr.api import evaluate

    report.write_text(json.dumps(metrics(evaluate(str(checkpoint)))))
    return 0


def metrics(report: dict) -> dict:
    """The part of a report that does not depend on where a run was resumed."""
    return {name: report[name] for name in ("kind", "step", "split", "users", "model")}


def compared(report: Path, expected: Path) -> str | None:
    before, after = (metrics(json.loads(path.read_text())) for path in (expected, report))
    wrong = [key for key in before | after if before.get(key) != after.get(key)]
    return f"{wrong[0]} was {before.get(wrong[0])}, is {after.get(wrong[0])}"[:400] if wrong else None


def entries(
    folder: Path, run_dir: Path, checkpoint: Path
) -> dict[str, tuple[Callable[[], int], Callable[[], str | None]]]:
    """(run, difference) by name: what reads a run folder."""
    report, expected = folder / "report.json", folder.parent / "evaluated.json"
    if not expected.exists():
        evaluate(folder.parent / "whole", expected)
    resumed = folder.parent / "resumed" / "report.json"
    return {
        "status": (lambda: main(["status", str(run_dir)]), lambda: None),
        "train": (lambda: train(folder, run_dir, STEPS + 2), lambda: compared(run_dir / "report.json", resumed)),
        "evaluate": (lambda: evaluate(checkpoint, report), lambda: compared(report, expected)),
    }


FILES = {
    "status.json": ("status", "train"),
    "checkpoints/best.json": ("evaluate", "train"),
    "metrics.jsonl": ("train",),
    "config.yaml": ("train",),
    "progress.json": ("evaluate", "train"),
}


@target("run folder")
def run_files(random: np.random.Generator, folder: Path) -> Trial:
    """A small file of the folder.

    status.json and best.json have no checksum, and that of progress.json is made anew: numbers there may be others, so
    what such a run gives is not compared.
    """
    run_dir, checkpoint = folder / "run", folder / "run" / "checkpoints" / f"step-{STEPS:08d}"
    shutil.copytree(run_folder(folder), run_dir)
    name = str(random.choice(list(FILES)))
    file = checkpoint / name if name == "progress.json" else run_dir / name
    mutate = other_json if name.endswith(".json") else partial(changed, separator=b": ")
    content, mutation = mutate(random, file.read_bytes())
    file.write_bytes(content)
    entry = str(random.choice(list(FILES[name])))
    run, difference = entries(folder, run_dir, run_dir)[entry]
    if name == "progress.json":
        sign(checkpoint, name)
    compare = name in ("metrics.jsonl", "config.yaml")
    return Trial(f"{entry}, {name}, {mutation}", run, difference if compare else lambda: None)


def sign(checkpoint: Path, name: str) -> None:
    """Make the sum of a file anew."""
    from hashlib import sha256

    sums = checkpoint / SUMS
    digest = sha256((checkpoint / name).read_bytes()).hexdigest()
    lines = [f"{digest}  {name}" if line.endswith(f" {name}") else line for line in sums.read_text().splitlines()]
    sums.write_text("\n".join([*lines, ""]))


@target("checkpoint")
def checkpoint(random: np.random.Generator, folder: Path) -> Trial:
    """Any file of a checkpoint. A run goes on from the checkpoint before, to the same end."""
    run_dir, newest = folder / "run", folder / "run" / "checkpoints" / f"step-{STEPS:08d}"
    shutil.copytree(run_folder(folder), run_dir)
    file = sorted(path for path in newest.iterdir() if path.is_file())
    chosen = file[int(random.integers(len(file)))]
    content, mutation = damaged(random, chosen.read_bytes())
    chosen.write_bytes(content)
    entry = str(random.choice(["evaluate", "train"]))
    run, difference = entries(folder, run_dir, newest)[entry]
    return Trial(f"{entry}, {chosen.name}, {mutation}", run, difference)

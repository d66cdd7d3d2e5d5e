"""Whether two checkouts of gr train the same model: every loss and every test metric, bit for bit.

    python -m benchmarks.same_losses BEFORE AFTER --data DIR [--work DIR] [--steps 12] [--ranks 1 2] [--only TEXT]

BEFORE, AFTER: checkouts, run with this Python. --data: folder with ml-100k, ml-1m and criteo as published. A run of a
checkout that --work has already is not repeated: remove its folder after a change. Exit code 1 where anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A shipped configuration, found by its file name, since checkouts may differ in its folder."""

    config: str
    data: str
    overrides: tuple[str, ...] = ()
    evaluation: str | None = None


CASES = (
    Case("ml-100k-hstu", "ml-100k"),
    Case("ml-1m-hstu", "ml-1m", ("trainer.global_batch_size=16",)),
    Case("ml-1m-sasrec", "ml-1m", ("trainer.global_batch_size=16",)),
    Case("synthetic-hstu", "synthetic/train", (), "synthetic/test"),
    Case("synthetic-sasrec", "synthetic/train", (), "synthetic/test"),
    Case("synthetic-time", "synthetic-time/train", (), "synthetic-time/test"),
    Case("smoke", "synthetic/train", (), "synthetic/test"),
    Case("movielens-hstu", "ml-100k"),
    Case("streaming-hstu-debug", "streaming"),
    Case("dlrm-v4-hstu-debug", "streaming"),
    Case("clicks", "clicks/train", (), "clicks/test"),
    Case("criteo-debug", "criteo/train", (), "criteo/test"),
    Case("criteo-kaggle-debug", "criteo/train", (), "criteo/test"),
    Case("criteo-terabyte-debug", "criteo/train", (), "criteo/test"),
    Case("mlperf-dlrm-v2-debug", "criteo-multi-hot/train", (), "criteo-multi-hot/test"),
)


def main() -> int:
    arguments = _arguments()
    _prepare(arguments.before, arguments.data.resolve(), arguments.work / "data")
    different = 0
    for case in (case for case in CASES if arguments.only in case.config):
        for ranks in arguments.ranks:
            outcomes = [
                _run(checkout, case, ranks, arguments.steps, arguments.work / side)
                for side, checkout in (("before", arguments.before), ("after", arguments.after))
            ]
            faults = list(_differences(*outcomes))
            different += bool(faults)
            print(f"{case.config:<24} {ranks} rank(s)  {faults[0] if faults else f'equal, {len(outcomes[0])} figures'}")
    return 1 if different else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.same_losses", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/same-losses"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", help="only configurations with this in their name")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    return arguments


def _prepare(checkout: Path, raw: Path, out: Path) -> None:
    """Writes every data folder that is not there, with the code of one checkout."""
    parts = sorted((raw / "criteo").glob("*.orc"))
    commands: dict[str, list[str]] = {
        "ml-100k": ["movielens-100k", "--source", f"{raw}/ml-100k"],
        "ml-1m": ["movielens-1m", "--source", f"{raw}/ml-1m"],
        "synthetic": ["synthetic", "--records", "4000", "--items", "2000", "--categories", "20", "--length", "64"],
        "synthetic-time": ["synthetic-time", "--records", "4000"],
        "streaming": ["streaming"],
        "clicks": ["clicks"],
        "criteo/train": ["criteo", "--source", *map(str, parts[:-1]), "--threshold", "2"],
        "criteo/test": ["criteo", "--source", str(parts[-1]), "--vocabulary", f"{out}/criteo/train"],
        "criteo-multi-hot/train": ["multi-hot", "--source", f"{out}/criteo/train"],
        "criteo-multi-hot/test": ["multi-hot", "--source", f"{out}/criteo/test"],
    }
    for name, command in commands.items():
        if not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            _gr(checkout, ["prepare", *command, "--out", f"{out}/{name}"])


def _run(checkout: Path, case: Case, ranks: int, steps: int, work: Path) -> list[tuple[str, str]]:
    """(what, its value as JSON) of every loss and every test metric of one run."""
    data, run_dir = work.parent / "data", work / f"{case.config}-{ranks}"
    if not (run_dir / "report.json").exists():
        (config,) = checkout.glob(f"configs/[!s]*/{case.config}.yaml")
        evaluation = "null" if case.evaluation is None else f"{data}/{case.evaluation}"
        settings = (f"data.path={data}/{case.data}", f"evaluation.path={evaluation}", f"run_dir={run_dir}")
        sizes = (f"trainer.steps={steps}", "trainer.log_every=1", "evaluation.every=null", "checkpoint.every=null")
        command = ["train", str(config.resolve()), *settings, *sizes, *case.overrides]
        _gr(checkout, command, ranks)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(f"loss of step {line['step']}", json.dumps(line["loss"])) for line in lines if line["kind"] == "train"]
    report = json.loads((run_dir / "report.json").read_text())
    return losses + [(f"test {name}", json.dumps(value)) for name, value in sorted(report["model"].items())]


def _gr(checkout: Path, command: Sequence[str], ranks: int = 1) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "gr", *command], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: gr {' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _differences(before: list[tuple[str, str]], after: list[tuple[str, str]]) -> Iterator[str]:
    for (what, left), (also, right) in zip(before, after, strict=False):
        if what != also or left != right:
            yield f"{what}: {left} before, {right} after ({also})"
    if len(before) != len(after):
        yield f"{len(before)} figures before, {len(after)} after"


if __name__ == "__main__":
    sys.exit(main())

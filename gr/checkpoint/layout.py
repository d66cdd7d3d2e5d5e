"""Checkpoints on disk.

    run_dir/checkpoints/step-00000120/     .metadata, *.distcp (DCP), progress.json, config.yaml, SHA256SUMS, and
                                           the recipe's artifacts: schema.json and what else of the data a
                                           model needs to be used
    run_dir/checkpoints/step-00000100.damaged/   found not to be what was written; kept for whoever wants to know
    run_dir/checkpoints/.step-00000140/    being written or removed: never looked at, gone at the next start
    run_dir/checkpoints/best.json          {"step": 120, "metric": "ndcg@10", "value": 0.17}

A folder gets its final name by one rename, after every rank has written.
"""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr.config.load import PROGRESS
from gr.errors import CheckpointError
from gr.files import read_json, sync, write_json
from gr.logging import get_logger, log_once

log = get_logger(__name__)
STEP_NAME = re.compile(r"step-(\d{8,})")
CONFIG = "config.yaml"
METADATA = ".metadata"
CHECKPOINTS = "checkpoints"
SHARED = (CONFIG, PROGRESS, METADATA)  # files that rank 0 writes for all, beside the artifacts
FORMAT = 2  # 1: without schema.json
BEST = "best.json"


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run."""

    path: Path

    def final(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        return self.path / f".step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.path.is_dir():
            return []
        named = [(match, each) for each in self.path.iterdir() if (match := STEP_NAME.fullmatch(each.name))]
        for _, folder in named:
            if not (folder / PROGRESS).is_file():
                log_once(log, f"{folder}: passed over, since without {PROGRESS} it is no whole checkpoint; remove it")
        return sorted(int(match[1]) for match, folder in named if (folder / PROGRESS).is_file())

    def latest(self) -> Path | None:
        return self.final(steps[-1]) if (steps := self.steps()) else None

    def describe_latest(self) -> str:
        return f"the last good checkpoint is {latest}" if (latest := self.latest()) else "there is no checkpoint yet"

    def best(self) -> dict[str, Any] | None:
        """The content of best.json, or None where there is none. Raises CheckpointError for anything else."""
        path = self.path / BEST
        if not path.is_file():
            return None
        remedy = "remove it, and the latest checkpoint takes the place of the best"
        best = read_json(path, CheckpointError, remedy)
        step, value, metric = best.get("step"), best.get("value"), best.get("metric")
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if type(step) is not int or not finite or not isinstance(metric, str):
            raise CheckpointError(f"{path}: has no step, value or metric that gr wrote; {remedy}")
        return best

    def mark_best(self, step: int, metric: str, value: float) -> None:
        write_json(self.path / BEST, {"step": step, "metric": metric, "value": value})

    def commit(self, step: int) -> None:
        """Makes a fully written checkpoint visible, in place of an older one of the same step."""
        final = self.final(step)
        if final.exists():
            shutil.rmtree(final)
        sync(self.partial(step))
        self.partial(step).rename(final)
        sync(self.path)

    def prune(self, keep_last: int) -> None:
        """Removes all but the newest `keep_last` and the best. Raises OSError; what is left is no checkpoint then."""
        best = self.best()
        spared = {*self.steps()[-keep_last:], *([best["step"]] if best else [])}
        for step in self.steps():
            if step not in spared:
                shutil.rmtree(self.final(step).rename(self.partial(step)))

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is not looked at again; returns where it is then."""
        aside = self.path / f"{self.final(step).name}.damaged"
        if aside.exists():
            shutil.rmtree(aside)
        return self.final(step).rename(aside)

    def remove_partial(self) -> None:
        """Removes what a killed run left half written, but for files that NFS keeps for their readers (.nfsXXXX)."""
        for path in self.path.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
            if any(path.glob("*.distcp")):  # it would be taken for a part of the step when that is saved again
                shutil.rmtree(path)


def resolve(path: str | Path) -> Path:
    """The checkpoint that a user means: a checkpoint itself, or a run folder's best, or else its latest.

    Raises CheckpointError when there is none.
    """
    path = Path(path)
    if (path / PROGRESS).is_file():
        return path
    folder = CheckpointFolder(path if path.name == CHECKPOINTS else path / CHECKPOINTS)
    best = folder.best()
    if best and best["step"] in folder.steps():
        return folder.final(best["step"])
    if latest := folder.latest():
        return latest
    raise CheckpointError(f"{path}: no checkpoint there; expected a run folder or a step-XXXXXXXX folder in it")


def read_progress(path: Path) -> dict[str, Any]:
    """progress.json of a checkpoint. Raises CheckpointError for a checkpoint of another format or without progress."""
    remedy = "remove its folder to use the checkpoint before"
    progress = read_json(path / PROGRESS, CheckpointError, remedy)
    step, data = progress.get("step"), progress.get("data")
    numbers = [step, *(value for value in data.values() if value is not None)] if isinstance(data, dict) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise CheckpointError(f"{path / PROGRESS}: has no step or place in the data that is a number; {remedy}")
    if (named := STEP_NAME.fullmatch(path.name)) and int(named[1]) != step:
        raise CheckpointError(f"{path}: is of step {step} ({PROGRESS}); name the folder step-{step:08d}")
    if progress.get("format", 1) != FORMAT:
        raise CheckpointError(
            f"{path} has format {progress.get('format', 1)}, this release reads format {FORMAT}: train again, or use "
            "the release that wrote it"
        )
    return progress

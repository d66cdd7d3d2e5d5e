"""A small experiment for launchers: long enough to be interrupted, dealt evenly to 1, 2 and 3 ranks."""

import json
import os
import sys
from pathlib import Path

from gr.config import dump_config
from tests.support import ROOT
from tests.support.tiny import tiny_config, write_tiny

STEPS, EVERY = 300, 50


def write_job(folder: Path, *, steps: int = STEPS) -> Path:
    """Writes data and configuration under `folder`; returns the configuration's path."""
    data = write_tiny(folder / "data")
    config = tiny_config(
        data,
        folder / "unused",
        trainer={"steps": steps, "global_batch_size": 12},
        evaluation={"global_batch_size": 12, "baselines": []},
        checkpoint={"every": EVERY, "keep_last": 3},
        planner={"sharding": "row_wise"},
    )
    lanes = config.data.model_copy(update={"lanes": 6})
    path = folder / "job.yaml"
    path.write_text(dump_config(config.model_copy(update={"data": lanes})))
    return path


def environment() -> dict[str, str]:
    """As a user has it who activated the environment that runs these tests and stands in the repository."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of metrics.jsonl, in file order: a step that ran twice is there twice."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in parsed if line["kind"] == "train"]


def status(run_dir: Path) -> dict:
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}

"""A small experiment for launchers: long enough to be interrupted, dealt evenly to 1, 2 and 3 ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

from gr.config import dump_config
from tests.support import ROOT
from tests.support.tiny import tiny_config, write_tiny

STEPS, EVERY = 200, 40
PATIENCE_SECONDS = 300


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


def undisturbed(workspace: Path, experiment: Path, *, ranks: int, steps: int) -> dict[int, float]:
    """Loss by step of a whole run by torchrun alone."""
    run_dir = workspace / f"undisturbed-{ranks}"
    command = ["torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m", "gr", "train", str(experiment)]
    done = subprocess.run(
        [*command, f"run_dir={run_dir}", f"trainer.steps={steps}"],
        cwd=workspace,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(losses(run_dir))


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of metrics.jsonl, in file order: a step that ran twice is there twice."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in parsed if line["kind"] == "train"]


def status(run_dir: Path) -> dict:
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}

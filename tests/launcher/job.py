"""A small experiment for launchers, dealt evenly to 1, 2 and 3 ranks. Gates (tests.support.gate) make time in it."""

import json
import os
import sys
from pathlib import Path

from gr.config import dump_config, load_config
from tests.support import ROOT
from tests.support.run_folder import losses
from tests.support.tiny import tiny_config, write_tiny

STEPS, EVERY = 26, 8
HELD = EVERY + 5  # where a run stands while something is done to it


def write_job(folder: Path) -> Path:
    """Writes data and configuration under `folder`; returns the configuration's path."""
    data = write_tiny(folder / "data")
    config = tiny_config(
        data,
        folder / "unused",
        trainer={"steps": STEPS, "global_batch_size": 12},
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


def undisturbed(config: Path, run_dir: Path, *, ranks: int) -> dict[int, float]:
    """Loss by step of a whole run that no launcher had a hand in: the ranks are forked here."""
    from tests.support.ranks import run_ranks  # loads torch, which tests of the command line do without

    return dict(run_ranks(_train, ranks, config, run_dir)[0])


def _train(world, config: Path, run_dir: Path) -> list[tuple[int, float]]:
    from gr.experiment import train

    train(load_config(str(config), [f"run_dir={run_dir}"]), world)
    return losses(run_dir)


def status(run_dir: Path) -> dict:
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def step(run_dir: Path) -> int:
    """The last one that status.json tells of; a run that stands at the gate of HELD tells of the one before."""
    return status(run_dir).get("step", 0)


def world_size(run_dir: Path) -> int:
    return status(run_dir).get("world_size", 0)

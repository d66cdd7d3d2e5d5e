"""The profiler records its steps, and leaves a trace however the run ends."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gr.config.run import ProfilerConfig
from gr.training.callbacks import Profiler
from gr.training.trainer import StepResult


def run(path: Path, *, start: int, steps: int, run_steps: int = 6, rank: int = 0) -> list[int]:
    """Runs `run_steps` steps, of which step s multiplies matrices s + 2 wide; returns the widths in the trace."""
    profiler = Profiler(ProfilerConfig(start=start, steps=steps), path, rank)
    trainer: Any = SimpleNamespace(step=0)
    profiler.on_start(trainer)
    for step in range(run_steps):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(2, step + 2) @ torch.ones(step + 2, 2)
        trainer.step = step + 1
        profiler.on_step(trainer, StepResult(1.0, 1, 1, 0.0, 1.0))
    profiler.on_end(trainer)
    assert profiler.recording is None
    trace = path / "profile" / f"rank-{rank}.trace.json.gz"
    if not trace.exists():
        return []
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert "aten::mm" in names and "aten::mm" in (path / "profile" / f"rank-{rank}.txt").read_text()
    return sorted({int(name.removeprefix("step ")) for name in names if name.startswith("step ")})


@pytest.mark.parametrize(
    ("start", "steps", "recorded"),
    [(0, 2, [0, 1]), (2, 3, [2, 3, 4]), (4, 9, [4, 5])],
    ids=["from the start", "in the middle", "past the end"],
)
def test_records_its_steps(tmp_path: Path, start: int, steps: int, recorded: list[int]) -> None:
    assert run(tmp_path, start=start, steps=steps, rank=start) == recorded


def test_a_run_that_ends_before_leaves_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, start=6, steps=1, run_steps=4) == []
    assert not (tmp_path / "profile").exists()

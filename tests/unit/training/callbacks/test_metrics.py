"""Metrics: what is written when, with and without a terminal."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gr.training.callbacks import Metrics, metrics
from gr.training.trainer import StepResult
from tests.support.writer import Writer


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Log lines."""
    said: list[str] = []
    monkeypatch.setattr(metrics.log, "info", lambda message, *values: said.append(message % values))
    return said


def run(
    writer: Writer | None,
    *,
    steps: int = 5,
    every: int = 2,
    stop_at: int | None = None,
    done: int = 0,
    peak: float | None = None,
    norm: torch.Tensor | None = None,
) -> Metrics:
    config = SimpleNamespace(trainer=SimpleNamespace(global_batch_size=10))
    phases = SimpleNamespace(read=lambda: {"forward_seconds": 0.5})
    module = SimpleNamespace(learning_rate=0.5, config=config, phases=phases, gradient_norm=norm)
    world = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(step=done, steps=steps, stopped=False, module=module, world=world)
    callback = Metrics(writer, every, peak)  # type: ignore[arg-type]
    callback.on_start(trainer)
    while trainer.step < steps and not trainer.stopped:
        trainer.step += 1
        trainer.stopped = trainer.step == stop_at
        callback.on_step(trainer, StepResult(float(trainer.step), 10, 40, wait=0.25, seconds=1.0, flops=600))
    callback.on_end(trainer)
    return callback


def test_means_and_sums_over_the_steps_since_the_last_line(lines: list[str]) -> None:
    writer = Writer()
    run(writer)
    rates = {"learning_rate": 0.5, "examples_per_second": 10.0, "tokens_per_second": 40.0, "data_wait_seconds": 0.5}
    rates |= {"forward_seconds": 0.5, "flops_per_second": 600.0}
    memory = [values.pop("peak_host_bytes") for _, _, values in writer.records]
    assert all(10**7 < held < 10**12 for held in memory)
    assert writer.records == [
        (2, "train", {**rates, "loss": 1.5}),
        (4, "train", {**rates, "loss": 3.5}),
        (5, "train", {**rates, "data_wait_seconds": 0.25, "loss": 5.0}),
    ]


def test_the_share_of_the_peak_and_the_gradient_norm_where_they_are_known(lines: list[str]) -> None:
    writer = Writer()
    run(writer, steps=2, peak=1200.0, norm=torch.tensor(0.25))
    [(_, _, values)] = writer.records
    assert (values["mfu"], values["gradient_norm"]) == (0.5, 0.25)


def test_lines_without_a_terminal(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """3 steps of 10 examples are left at 10 examples/s."""
    assert run(Writer(), steps=5).bar is None
    assert lines[0] == "step 2/5  loss 1.5000  10 examples/s  40 tokens/s  ETA 00:03"
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert capsys.readouterr() == ("", "")


def test_a_stopped_run_writes_its_last_step(lines: list[str]) -> None:
    writer = Writer()
    run(writer, steps=100, every=50, stop_at=3)
    assert [(step, values["loss"]) for step, _, values in writer.records] == [(3, 2.0)]


def test_a_resumed_run_counts_only_its_own_steps(lines: list[str]) -> None:
    writer = Writer()
    run(writer, steps=8, every=4, done=6)
    assert [(step, values["loss"]) for step, _, values in writer.records] == [(8, 7.5)]


def test_other_ranks_write_nothing(lines: list[str]) -> None:
    run(None)
    assert lines == []


def test_a_bar_on_a_terminal(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    callback = run(Writer(), done=1)
    assert callback.bar is not None and callback.bar.disable, "a bar that is closed"
    assert (callback.bar.total, callback.bar.n) == (5, 5)
    shown = capsys.readouterr().err
    assert "5/5" in shown and "loss 5.0000" in shown
    assert lines == []

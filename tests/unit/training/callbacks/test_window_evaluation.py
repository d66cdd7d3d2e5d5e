"""When a window is measured, and what becomes of one that has nothing to measure."""

from types import SimpleNamespace
from typing import Any

import pytest

from gr.errors import DataError
from gr.training.callbacks import WindowEvaluation
from gr.training.callbacks import window_evaluation as next_window
from gr.training.trainer import StepResult
from tests.support.writer import Writer

RESULT = StepResult(0.5, examples=1, tokens=1, wait=0.0, seconds=1.0)
STARTS = {0: 0, 3: 1, 5: 2}


def run(
    first: int, last: int, evaluate: Any, *, stopped: bool = False, owing: bool = False
) -> list[tuple[int, str, dict[str, float]]]:
    writer = Writer()
    callback = WindowEvaluation(STARTS.get, evaluate, writer, shown=["auc"])  # type: ignore[arg-type]
    module = SimpleNamespace(agree=lambda: None)
    trainer: Any = SimpleNamespace(step=first, steps=last, module=module, stopped=stopped, owing=owing)
    callback.on_start(trainer)
    while trainer.step < last:
        trainer.step += 1
        callback.on_step(trainer, RESULT)
    return writer.records


def test_before_the_first_batch_of_each() -> None:
    found = run(0, 7, lambda window: {"auc": window / 10})
    assert found == [
        (0, "next_window", {"window": 0, "auc": 0.0}),
        (3, "next_window", {"window": 1, "auc": 0.1}),
        (5, "next_window", {"window": 2, "auc": 0.2}),
    ]


def test_once_where_a_run_ends_and_another_goes_on() -> None:
    assert [step for step, _, _ in run(1, 3, lambda window: {"auc": 0.5})] == [3]
    assert [step for step, _, _ in run(3, 7, lambda window: {"auc": 0.5})] == [5]


def test_a_stop_leaves_it_to_the_resumed_run() -> None:
    assert run(2, 3, lambda window: {"auc": 0.5}, stopped=True) == []
    assert [step for step, _, _ in run(3, 5, lambda window: {"auc": 0.5}, owing=True)] == [3, 5]


def test_a_window_of_one_class_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(next_window.log, "info", lambda message, *values: said.append(message % values))

    def evaluate(window: int) -> dict[str, float]:
        if window == 1:
            raise DataError("all 9 labels are 0")
        return {"auc": 0.5}

    assert [step for step, _, _ in run(0, 7, evaluate)] == [0, 5]
    assert "step 3/7  window 1: all 9 labels are 0" in said

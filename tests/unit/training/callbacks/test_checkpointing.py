"""Checkpointing and Evaluation with a real store: what is saved when, what is marked and kept."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gr.checkpoint import CheckpointStore, ModelState, resolve
from gr.checkpoint.layout import FORMAT
from gr.config.run import CheckpointConfig
from gr.dist import World
from gr.training.callbacks import Checkpointing, Evaluation
from gr.training.trainer import StepResult

RESULT = StepResult(1.0, 1, 1, 0.0, 1.0)


class NoTables:
    def entries(self) -> list:
        return []

    def set_steps(self, steps: int) -> None: ...


class NotingStore(CheckpointStore):
    """The real store of one small tensor, which notes its saves."""

    def __init__(self, path: Path, world: World) -> None:
        state = ModelState({"w": nn.Parameter(torch.zeros(2))}, None, NoTables())
        super().__init__(path / "checkpoints", state, "seed: 1\n", world, asynchronous=False)
        self.saved: list[int] = []

    def save(self, progress: dict[str, Any], keep_last: int) -> None:
        super().save(progress, keep_last)
        self.saved.append(progress["step"])


class FakeWriter:
    def __init__(self) -> None:
        self.records: list[tuple[int, str, float]] = []

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        self.records.append((step, kind, values["ndcg@10"]))


def trainer_at(step: int, steps: int, world: World) -> Any:
    feed = SimpleNamespace(state_dict=lambda: {"position": 10 * trainer.step})
    module = SimpleNamespace(agree=lambda: None)
    trainer = SimpleNamespace(
        step=step, steps=steps, pipeline=feed, module=module, world=world, stopped=False, owing=False
    )
    trainer.converged = False
    return trainer


class TestCheckpointing:
    def run(self, path: Path, world: World, every: int | None, *, steps: int = 5) -> NotingStore:
        store, trainer = NotingStore(path, world), trainer_at(0, steps, world)
        callback = Checkpointing(store, CheckpointConfig(every=every, keep_last=9))
        while trainer.step < steps:
            trainer.step += 1
            callback.on_step(trainer, RESULT)
        callback.on_end(trainer)
        return store

    @pytest.mark.parametrize(("every", "saved"), [(2, [2, 4, 5]), (5, [5]), (None, [5]), (1, [1, 2, 3, 4, 5])])
    def test_on_schedule_and_at_the_end_once(
        self, tmp_path: Path, alone: World, every: int | None, saved: list[int]
    ) -> None:
        store = self.run(tmp_path, alone, every)
        assert store.saved == saved == store.folder.steps()

    def test_progress(self, tmp_path: Path, alone: World) -> None:
        store = self.run(tmp_path, alone, 4)
        progress = json.loads((store.folder.final(4) / "progress.json").read_text())
        assert progress == {"format": FORMAT, "step": 4, "ranks": 1, "data": {"position": 40}, "stopped": False}


class TestEvaluation:
    def run(
        self,
        path: Path,
        world: World,
        values: Sequence[float],
        *,
        step: int = 0,
        steps: int = 7,
        stop: int | None = None,
        patience: int | None = None,
    ) -> tuple[NotingStore, FakeWriter]:
        """One value of ndcg@10 an evaluation; the first is that of the untrained model. stop: asked to after that step.

        From `step` on it is resumed.
        """
        store, writer = NotingStore(path, world), FakeWriter()
        checkpointing = Checkpointing(store, CheckpointConfig(keep_last=1))
        coming = iter(values)
        callback = Evaluation(
            lambda: {"hr@10": 0.9, "mrr": 0.8, "ndcg@10": next(coming)},
            checkpointing,
            writer,  # type: ignore[arg-type]
            every=2,
            select_by="ndcg@10",
            shown=("hr@10", "mrr"),
            over="3 users",
            patience=patience,
        )
        trainer = trainer_at(step, steps, world)
        if step:
            trainer.owing = json.loads((store.folder.final(step) / "progress.json").read_text())["stopped"]
        for each in (callback, checkpointing):
            each.on_start(trainer)
        while trainer.step < trainer.steps and not (trainer.stopped or trainer.converged):
            trainer.step += 1
            trainer.stopped = trainer.step == stop
            for each in (callback, checkpointing):
                each.on_step(trainer, RESULT)
        for each in (callback, checkpointing):
            each.on_end(trainer)
        assert next(coming, None) is None, "as many evaluations as expected"
        return store, writer

    def test_the_best_is_marked_and_outlives_pruning(self, tmp_path: Path, alone: World) -> None:
        store, writer = self.run(tmp_path, alone, [0.05, 0.1, 0.3, 0.2, 0.25])
        assert writer.records == [
            (0, "validation", 0.05),
            (2, "validation", 0.1),
            (4, "validation", 0.3),
            (6, "validation", 0.2),
            (7, "validation", 0.25),
        ]
        assert store.folder.best() == {"step": 4, "metric": "ndcg@10", "value": 0.3}
        assert store.folder.steps() == [4, 7]
        assert resolve(tmp_path).name == "step-00000004"

    def test_patience_ends_training(self, tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture) -> None:
        """After two evaluations that are no better; resumed, when only the report was owed, it ends at once."""
        with caplog.at_level("INFO", logger="gr"):
            store, writer = self.run(tmp_path, alone, [0.0, 0.1, 0.3, 0.2, 0.3], steps=20, patience=2)
        assert [step for step, *_ in writer.records] == [0, 2, 4, 6, 8]
        assert store.folder.steps() == [4, 8] and store.folder.best()["step"] == 4  # type: ignore[index]
        assert "training ends: no ndcg@10 above 0.3000, that of step 4, in 2 evaluations" in caplog.text
        _, writer = self.run(tmp_path, alone, [], step=8, steps=20, patience=2)
        assert writer.records == []
        _, writer = self.run(tmp_path, alone, [0.1], step=8, steps=20, patience=3)
        assert [step for step, *_ in writer.records] == [10], "more patience goes on"

    def test_the_untrained_model_is_no_checkpoint(self, tmp_path: Path, alone: World) -> None:
        """It is only a point to compare with, however good."""
        store, _ = self.run(tmp_path, alone, [0.9, 0.1, 0.1, 0.1, 0.1])
        assert store.folder.best() == {"step": 2, "metric": "ndcg@10", "value": 0.1}, "of equals the first"

    def test_a_resumed_run_keeps_the_best_it_had(self, tmp_path: Path, alone: World) -> None:
        self.run(tmp_path, alone, [0.05, 0.1, 0.3, 0.2], steps=6)
        store, writer = self.run(tmp_path, alone, [0.25, 0.28], step=6, steps=10)
        assert [step for step, _, _ in writer.records] == [8, 10], "not the untrained model again"
        assert store.folder.best() == {"step": 4, "metric": "ndcg@10", "value": 0.3}
        assert store.folder.steps() == [4, 10]

    @pytest.mark.parametrize("stop", [1, 2, 3, 4, 6, 7])
    def test_a_stop_saves_first_and_the_resumed_run_evaluates(self, tmp_path: Path, alone: World, stop: int) -> None:
        """Together they do what one run does: as many evaluations, the same best and the same checkpoints kept."""
        values = [0.05, 0.1, 0.3, 0.2, 0.25]
        whole, wholly = self.run(tmp_path / "whole", alone, values)
        done = sum(step < stop for step in (0, 2, 4, 6, 7))
        first, before = self.run(tmp_path / "part", alone, values[:done], stop=stop)
        assert first.saved[-1] == stop and stop not in [step for step, _, _ in before.records]
        second, after = self.run(tmp_path / "part", alone, values[done:], step=stop)
        assert before.records + after.records == wholly.records
        assert stop not in second.saved, "what it loaded is saved already"
        assert second.folder.best() == whole.folder.best() and second.folder.steps() == whole.folder.steps()

    def test_only_the_main_rank_writes(self, tmp_path: Path, alone: World) -> None:
        store, _ = self.run(tmp_path, replace(alone, rank=1), [0.05, 0.1, 0.3, 0.2, 0.25])
        assert store.folder.best() is None and store.folder.steps() == [] and store.saved == [2, 4, 6, 7]

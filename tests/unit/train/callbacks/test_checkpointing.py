"""Checkpointing and Evaluation on real folders, and a store that writes only what the layout needs."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gr.checkpoint import CheckpointFolder, resolve
from gr.config.tree import CheckpointConfig
from gr.train.callbacks import Checkpointing, Evaluation
from gr.train.trainer import StepResult

RESULT = StepResult(1.0, 1, 1, 0.0)


class FakeStore:
    """A CheckpointStore without tensors."""

    def __init__(self, path: Path) -> None:
        self.folder = CheckpointFolder(path / "checkpoints")
        self.saved: list[int] = []
        self.finished = 0

    def save(self, progress: dict[str, Any], keep_last: int) -> None:
        partial = self.folder.partial(progress["step"])
        partial.mkdir(parents=True)
        (partial / "progress.json").write_text(json.dumps(progress))
        self.folder.commit(progress["step"])
        self.folder.prune(keep_last)
        self.saved.append(progress["step"])

    def finish(self) -> None:
        self.finished += 1


class FakeWriter:
    def __init__(self) -> None:
        self.records: list[tuple[int, str, float]] = []

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        self.records.append((step, kind, values["ndcg@10"]))


def trainer_at(step: int, steps: int, *, main: bool = True) -> Any:
    loader = SimpleNamespace(state_dict=lambda: {"position": 10 * trainer.step})
    trainer = SimpleNamespace(step=step, steps=steps, loader=loader, world=SimpleNamespace(is_main=main), stopped=False)
    return trainer


class TestCheckpointing:
    def run(self, path: Path, every: int | None, *, steps: int = 5) -> FakeStore:
        store, trainer = FakeStore(path), trainer_at(0, steps)
        callback = Checkpointing(store, CheckpointConfig(every=every, keep_last=9))  # type: ignore[arg-type]
        callback.on_start(trainer)
        while trainer.step < steps:
            trainer.step += 1
            callback.on_step(trainer, RESULT)
        callback.on_end(trainer)
        return store

    @pytest.mark.parametrize(("every", "saved"), [(2, [2, 4, 5]), (5, [5]), (None, [5]), (1, [1, 2, 3, 4, 5])])
    def test_on_schedule_and_at_the_end_once(self, tmp_path: Path, every: int | None, saved: list[int]) -> None:
        store = self.run(tmp_path, every)
        assert store.saved == saved and store.finished == 1

    def test_progress(self, tmp_path: Path) -> None:
        store = self.run(tmp_path, 4)
        progress = json.loads((store.folder.final(4) / "progress.json").read_text())
        assert progress == {"step": 4, "data": {"position": 40}}


class TestEvaluation:
    def run(
        self, path: Path, values: Sequence[float], *, every: int = 2, keep_last: int = 1, **trainer_options: Any
    ) -> tuple[FakeStore, FakeWriter]:
        """One value of ndcg@10 an evaluation; the first is that of the untrained model."""
        store, writer = FakeStore(path), FakeWriter()
        checkpointing = Checkpointing(store, CheckpointConfig(keep_last=keep_last))  # type: ignore[arg-type]
        coming = iter(values)
        callback = Evaluation(
            lambda: {"hr@10": 0.9, "mrr": 0.8, "ndcg@10": next(coming)},
            checkpointing,
            writer,  # type: ignore[arg-type]
            every=every,
            select_by="ndcg@10",
        )
        trainer = trainer_at(**{"step": 0, "steps": 7, **trainer_options})
        for each in (callback, checkpointing):
            each.on_start(trainer)
        while trainer.step < trainer.steps:
            trainer.step += 1
            for each in (callback, checkpointing):
                each.on_step(trainer, RESULT)
        for each in (callback, checkpointing):
            each.on_end(trainer)
        assert next(coming, None) is None, "as many evaluations as expected"
        return store, writer

    def test_the_best_is_marked_and_outlives_pruning(self, tmp_path: Path) -> None:
        store, writer = self.run(tmp_path, [0.05, 0.1, 0.3, 0.2, 0.25])
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
        assert store.finished >= 3, "a checkpoint is marked only once it is there"

    def test_the_untrained_model_is_no_checkpoint(self, tmp_path: Path) -> None:
        """It is only a point to compare with, however good."""
        store, _ = self.run(tmp_path, [0.9, 0.1, 0.1, 0.1, 0.1])
        assert store.folder.best() == {"step": 2, "metric": "ndcg@10", "value": 0.1}, "of equals the first"

    def test_a_resumed_run_keeps_the_best_it_had(self, tmp_path: Path) -> None:
        self.run(tmp_path, [0.05, 0.1, 0.3, 0.2], steps=6)
        store, writer = self.run(tmp_path, [0.25, 0.28], step=6, steps=10)
        assert [step for step, _, _ in writer.records] == [8, 10], "not the untrained model again"
        assert store.folder.best() == {"step": 4, "metric": "ndcg@10", "value": 0.3}
        assert store.folder.steps() == [4, 10]

    def test_only_the_main_rank_marks(self, tmp_path: Path) -> None:
        store, _ = self.run(tmp_path, [0.05, 0.1, 0.3, 0.2, 0.25], main=False)
        assert store.folder.best() is None and store.saved == [2, 4, 7]

"""Prequential validation: which examples are in the metrics, when they are written, and by whom."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gr.config.click import BCELoss
from gr.dist import World
from gr.errors import TrainingError
from gr.metrics.ranking import RankingMetrics
from gr.recipes.click import ClickObjective
from gr.training.callbacks import Prequential
from gr.training.callbacks import prequential as prequential
from gr.training.trainer import StepResult
from tests.support.writer import Writer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
B = 4
RESULT = StepResult(0.5, examples=B, tokens=B, wait=0.0, seconds=1.0)
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(prequential.log, "info", lambda message, *values: said.append(message % values))
    return said


def batches(steps: int) -> list[Batch]:
    """Logits and labels, both classes in each batch."""
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(B, generator=random), torch.tensor([0.0, 1.0, 0.0, 1.0])) for _ in range(steps)]


def run(given: list[Batch], writer: Writer | None, *, window: int = 1000, every: int = 2) -> None:
    objective = ClickObjective(BCELoss())
    metrics = RankingMetrics("train", ALONE, window=window)
    callback = Prequential(objective, metrics, writer, every=every)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(step=0, steps=len(given))
    for objective.scored in given:
        trainer.step += 1
        callback.on_step(trainer, RESULT)


def expected(given: list[Batch]) -> dict[str, float]:
    metrics = RankingMetrics("train", ALONE)
    for batch in given:
        metrics.update(*batch)
    return metrics.compute()


def test_every_few_steps_and_after_the_last(lines: list[str]) -> None:
    given, writer = batches(5), Writer()
    run(given, writer)
    assert [(step, kind) for step, kind, _ in writer.records] == [
        (2, "prequential"),
        (4, "prequential"),
        (5, "prequential"),
    ]
    for step, _, values in writer.records:
        assert values == expected(given[:step])
    assert lines[0].startswith("step 2/5  prequential  ne ") and "base_rate 0.5000" in lines[0]


@pytest.mark.parametrize(("window", "kept"), [(1, 1), (B, 1), (B + 1, 2), (2 * B, 2), (100, 5)])
def test_the_newest_examples_in_whole_batches(lines: list[str], window: int, kept: int) -> None:
    given, writer = batches(5), Writer()
    run(given, writer, window=window, every=5)
    (record,) = writer.records
    assert record[2] == expected(given[-kept:]) and record[2]["examples"] == kept * B


def test_a_window_of_one_class_is_told_and_training_goes_on(lines: list[str]) -> None:
    """Rare clicks: the first steps may have none."""
    given, writer = batches(4), Writer()
    given[:2] = [(logits, torch.zeros(B)) for logits, _ in given[:2]]
    run(given, writer)
    assert [step for step, _, _ in writer.records] == [4]
    assert lines[0].startswith("step 2/4  prequential: task 'train': ")


def test_a_model_that_diverged_is_an_error(lines: list[str]) -> None:
    given = batches(2)
    given[1] = (torch.full((B,), torch.nan), given[1][1])
    with pytest.raises(TrainingError, match="the model has diverged"):
        run(given, Writer())


def test_other_ranks_compute_and_write_nothing(lines: list[str]) -> None:
    run(batches(4), None)
    assert lines == []


class Model(torch.nn.Module):
    """A logit that every training step moves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, dense_BN: torch.Tensor, sparse: None, found: None) -> torch.Tensor:
        return dense_BN[:, 0] + self.weight


def test_an_example_is_scored_before_it_is_trained_on() -> None:
    model: Any = Model()
    objective = ClickObjective(BCELoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch: Any = SimpleNamespace(dense_BN=torch.zeros(B, 1), sparse=None, labels_B=torch.ones(B), to=lambda _: batch)
    for before in (0.0, 2.0):
        loss = objective.total(model, objective.inputs(batch, 0, 0, torch.device("cpu")), None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert objective.scored is not None
        logits_B, labels_B = objective.scored
        assert not logits_B.requires_grad and torch.equal(labels_B, torch.ones(B))
        assert torch.equal(logits_B, torch.full((B,), before))

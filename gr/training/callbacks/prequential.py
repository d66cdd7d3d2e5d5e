"""Prequential (progressive) validation: an example is scored before it is trained on (Blum et al., COLT 1999).

In one pass, that is; from a second epoch on it has been trained on before. Scores are those of training, with dropout.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gr.errors import DataError
from gr.logging import get_logger
from gr.metrics.writers import MetricsWriter, in_words
from gr.training.module import ScoringObjective
from gr.training.trainer import Callback, StepResult, Trainer

log = get_logger(__name__)
SHOWN = ("ne", "auc", "calibration", "base_rate")


class WindowedMetrics(Protocol):
    """Metrics of the newest examples: update() takes what the objective keeps as scored."""

    @property
    def update(self) -> Callable[..., None]: ...

    def compute(self) -> Mapping[str, float | None]: ...


class Prequential(Callback):
    """Writes metrics of the newest examples every `every` steps."""

    def __init__(
        self,
        objective: ScoringObjective,
        metrics: WindowedMetrics,
        writer: MetricsWriter | None,
        *,
        every: int,
        shown: Sequence[str] = SHOWN,
    ) -> None:
        self.objective, self.metrics, self.writer = objective, metrics, writer
        self.every, self.shown = every, shown

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        assert self.objective.scored is not None, "a step scores its batch"
        self.metrics.update(*self.objective.scored)
        if trainer.step % self.every and trainer.step != trainer.steps:
            return
        try:
            values = self.metrics.compute()
        except DataError as error:  # a short window may hold one class only, which is not the end of training
            log.info("step %d/%d  prequential: %s", trainer.step, trainer.steps, error)
            return
        if self.writer is not None:
            self.writer.write(trainer.step, "prequential", values)
            shown = in_words(values, self.shown)
            log.info("step %d/%d  prequential  %s", trainer.step, trainer.steps, shown)

"""Evaluates on the validation split on a schedule, and marks the best checkpoint."""

from collections.abc import Callable, Mapping, Sequence

from gr import watchdog
from gr.logging import get_logger
from gr.metrics.writers import MetricsWriter, in_words
from gr.training.callbacks.checkpointing import Checkpointing
from gr.training.trainer import Callback, StepResult, Trainer

log = get_logger(__name__)


class Evaluation(Callback):
    """Runs `evaluate` every `every` steps and at the end, and saves; a new best is marked, so it outlives pruning.

    A stop does not wait for it: the resumed run evaluates what it loaded.
    """

    def __init__(
        self,
        evaluate: Callable[[], Mapping[str, float | None]],
        checkpointing: Checkpointing,
        writer: MetricsWriter | None,
        *,
        every: int,
        select_by: str | None,
        shown: Sequence[str],
        over: str,
        patience: int | None = None,
    ) -> None:
        """select_by: the larger the better; None where no checkpoint is to be preferred. shown: on the log line. over:
        what is evaluated on, such as "800 users", for the log. patience: evaluations without a new best after which
        training ends; None: never.
        """
        self.evaluate, self.checkpointing, self.writer = evaluate, checkpointing, writer
        self.every, self.select_by, self.shown, self.over = every, select_by, shown, over
        self.patience = patience
        self.best_step, self.best = (0, float("inf")) if select_by is None else checkpointing.store.best(select_by)

    def on_start(self, trainer: Trainer) -> None:
        """The untrained model, as the point to compare with."""
        if trainer.step == 0:
            log.info("step 0/%d  evaluating the untrained model on %s", trainer.steps, self.over)
            self._measure(trainer)
        elif trainer.owing:
            self._evaluate(trainer)
        else:
            self._lose_patience(trainer)  # the run had ended, and only its report was still to be made

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if not trainer.stopped:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        if trainer.step % self.every and trainer.step != trainer.steps:
            return
        metrics = self._measure(trainer)
        self.checkpointing.save(trainer)
        if self.select_by is None:
            return
        value = metrics[self.select_by]
        if value is not None and value > self.best:
            self.best_step, self.best = trainer.step, value
            self.checkpointing.store.mark_best(trainer.step, self.select_by, value)
        self._lose_patience(trainer)

    def _lose_patience(self, trainer: Trainer) -> None:
        if self.patience is None or trainer.step - self.best_step < self.patience * self.every:
            return
        trainer.converged = True
        log.info(
            "step %d/%d  training ends: no %s above %.4f, that of step %d, in %d evaluations",
            *(trainer.step, trainer.steps, self.select_by, self.best, self.best_step, self.patience),
        )

    def _measure(self, trainer: Trainer) -> Mapping[str, float | None]:
        watchdog.enter(f"evaluation after step {trainer.step}", "evaluation")
        trainer.module.agree()
        metrics = self.evaluate()
        if self.writer is not None:
            self.writer.write(trainer.step, "validation", metrics)
            shown = in_words(metrics, self.shown)
            log.info("step %d/%d  validation  %s", trainer.step, trainer.steps, shown)
        return metrics

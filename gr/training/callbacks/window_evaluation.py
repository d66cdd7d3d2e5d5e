"""Evaluates each window of a stream before it is trained on."""

from collections.abc import Callable, Mapping, Sequence

from gr import watchdog
from gr.errors import DataError
from gr.logging import get_logger
from gr.metrics.writers import MetricsWriter, in_words
from gr.training.trainer import Callback, StepResult, Trainer

log = get_logger(__name__)


class WindowEvaluation(Callback):
    """Writes the metrics of a window when its first batch comes next."""

    def __init__(
        self,
        starting_window: Callable[[int], int | None],
        evaluate: Callable[[int], Mapping[str, float | None]],
        writer: MetricsWriter | None,
        *,
        shown: Sequence[str],
    ) -> None:
        """starting_window: the window that begins at a step. evaluate: the metrics of a window; collective."""
        self.starting_window, self.evaluate, self.writer, self.shown = starting_window, evaluate, writer, shown

    def on_start(self, trainer: Trainer) -> None:
        """A run that resumes where a window starts has measured it before it saved, unless it was asked to stop."""
        if trainer.step == 0 or trainer.owing:
            self._measure(trainer)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if not trainer.stopped:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        window = self.starting_window(trainer.step)
        if window is None:
            return
        watchdog.enter(f"evaluation of window {window}", "evaluation")
        if trainer.step == 0:
            log.info("step 0/%d  evaluating the untrained model on window %d", trainer.steps, window)
        trainer.module.agree()
        try:
            metrics = self.evaluate(window)
        except DataError as error:  # a window may hold one class only, which is not the end of training
            log.info("step %d/%d  window %d: %s", trainer.step, trainer.steps, window, error)
            return
        if self.writer is not None:
            self.writer.write(trainer.step, "next_window", {"window": window, **metrics})
            shown = in_words(metrics, self.shown)
            log.info("step %d/%d  window %d before training on it  %s", trainer.step, trainer.steps, window, shown)

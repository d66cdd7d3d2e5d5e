"""Saves on a schedule, at the end, and when the run is asked to stop."""

from gr import watchdog
from gr.checkpoint import CheckpointStore
from gr.config.run import CheckpointConfig
from gr.training.trainer import Callback, StepResult, Trainer


class Checkpointing(Callback):
    def __init__(self, store: CheckpointStore, config: CheckpointConfig) -> None:
        self.store, self.config = store, config
        self.saved_step = store.complete  # a run that resumes has nothing to save before its next step

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.config.every and trainer.step % self.config.every == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self.save(trainer)
        watchdog.enter("the end of the last checkpoint", "checkpoint")
        self.store.finish()

    def save(self, trainer: Trainer) -> None:
        """Saves the present step, once."""
        if self.saved_step != trainer.step:
            watchdog.enter(f"checkpoint of step {trainer.step}", "checkpoint")
            trainer.module.agree()
            progress = {"step": trainer.step, "data": trainer.pipeline.state_dict(), "stopped": trainer.stopped}
            self.store.save(progress, self.config.keep_last)
            self.saved_step = trainer.step

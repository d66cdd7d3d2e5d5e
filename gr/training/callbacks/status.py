"""Keeps status.json of the run folder up to date."""

from gr.checkpoint import CheckpointStore
from gr.status import StatusFile
from gr.training.trainer import Callback, StepResult, Trainer


class Status(Callback):
    """Writes on the main rank: at the start, every `every` steps, and after each checkpoint. Comes after Checkpointing.

    An asynchronous checkpoint is told of at the first step after it is complete.
    """

    def __init__(self, status: StatusFile, store: CheckpointStore, every: int) -> None:
        self.status, self.store, self.every = status, store, every
        self.told: int | None = None  # the checkpoint in status.json
        self.loss, self.seconds, self.steps = 0.0, 0.0, 0

    def on_start(self, trainer: Trainer) -> None:
        self._write(trainer)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self.loss += result.loss
        self.seconds += result.seconds
        self.steps += 1
        if trainer.step % self.every == 0 or self.told != self.store.complete:
            self._write(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        self.told = self.store.complete
        measured = {"loss": self.loss / self.steps, "seconds_per_step": self.seconds / self.steps} if self.steps else {}
        self.loss, self.seconds, self.steps = 0.0, 0.0, 0
        progress = {"step": trainer.step, "steps": trainer.steps, "checkpoint": self.told}
        self.status.update(**progress, save_seconds=self.store.seconds, **measured)

"""The counters of dynamic ids: what they found, and which came and went."""

from gr.embeddings import IdMap
from gr.metrics.writers import MetricsWriter
from gr.training.trainer import Callback, StepResult, Trainer


class DynamicIds(Callback):
    """Writes what the ids of the last `every` steps met, by table (gr.embeddings.IdMap.read_counts), over all ranks."""

    def __init__(self, ids: IdMap, writer: MetricsWriter | None, every: int) -> None:
        """writer: None on all ranks but the main one."""
        self.ids, self.writer, self.every = ids, writer, every

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.step % self.every == 0 or trainer.step == trainer.steps or trainer.stopped:
            counts = self.ids.read_counts()
            if self.writer is not None:
                self.writer.write(trainer.step, "ids", counts)

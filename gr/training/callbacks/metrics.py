"""Training metrics: a progress bar on a terminal, plain lines elsewhere, metrics.jsonl and TensorBoard always."""

import resource
import sys
from collections.abc import Mapping

import torch
from tqdm import tqdm

from gr.logging import get_logger
from gr.metrics.throughput import Throughput
from gr.metrics.writers import MetricsWriter
from gr.training.trainer import Callback, StepResult, Trainer

log = get_logger(__name__)


class Metrics(Callback):
    """Writes loss, learning rate, gradient norm, rates, seconds by phase and memory every `every` steps.

    On the main rank alone; seconds and memory are its own.
    """

    def __init__(self, writer: MetricsWriter | None, every: int, peak: float | None = None) -> None:
        """writer: None on all ranks but the main one, which then write nothing. peak: as in Throughput."""
        self.writer, self.every = writer, every
        self.throughput = Throughput(peak)
        self.loss_sum, self.wait, self.losses = 0.0, 0.0, 0
        self.bar: tqdm | None = None

    def on_start(self, trainer: Trainer) -> None:
        if self.writer is not None and sys.stderr.isatty():
            self.bar = tqdm(total=trainer.steps, initial=trainer.step, unit="step", dynamic_ncols=True)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.writer is None:
            return
        self.throughput.add(result.examples, result.tokens, result.seconds, result.flops)
        self.loss_sum += result.loss
        self.wait += result.wait
        self.losses += 1
        if self.bar is not None:
            self.bar.update()
        if trainer.step % self.every == 0 or trainer.step == trainer.steps or trainer.stopped:
            self._write(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.close()

    def _write(self, trainer: Trainer) -> None:
        norm = trainer.module.gradient_norm
        values = {
            "loss": self.loss_sum / self.losses,
            "learning_rate": trainer.module.learning_rate,
            **({} if norm is None else {"gradient_norm": float(norm)}),
            "data_wait_seconds": self.wait,
            **trainer.module.phases.read(),
            **_memory(trainer.world.device),
            **self.throughput.read(),
        }
        self.loss_sum, self.wait, self.losses = 0.0, 0.0, 0
        assert self.writer is not None
        self.writer.write(trainer.step, "train", values)
        if self.bar is not None:
            self.bar.set_postfix_str(_short(values))
        else:
            left = (trainer.steps - trainer.step) * _seconds_a_step(values, trainer)
            log.info("step %d/%d  %s  ETA %s", trainer.step, trainer.steps, _short(values), tqdm.format_interval(left))


def _memory(device: torch.device) -> dict[str, float]:
    """The most bytes that this process has held so far: of host memory, and of a GPU's by tensors."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = {"peak_gpu_bytes": float(torch.cuda.max_memory_allocated(device))} if device.type == "cuda" else {}
    return {"peak_host_bytes": float(host), **gpu}


def _short(values: Mapping[str, float]) -> str:
    return (
        f"loss {values['loss']:.4f}  {values['examples_per_second']:,.0f} examples/s  "
        f"{values['tokens_per_second']:,.0f} tokens/s"
    )


def _seconds_a_step(values: Mapping[str, float], trainer: Trainer) -> float:
    """Seconds a step, from the rate of examples."""
    batch = trainer.module.config.trainer.global_batch_size
    return batch / max(values["examples_per_second"], 1e-9)

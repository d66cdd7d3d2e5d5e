"""The training loop. It knows steps, batches and callbacks; what a step does is the train module's."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gr import watchdog
from gr.dist import World
from gr.errors import DataError, TrainingError
from gr.logging import get_logger, log_once
from gr.training.module import StepLoss, TrainModule
from gr.training.pipeline import Loader, Pipeline
from gr.training.signals import ONE_REQUEST_SECONDS, on_stop_signal

log = get_logger(__name__)


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats a token over the global batch. wait: seconds this rank stood still for its batch.

    seconds: of the step, with the wait and without the callbacks. flops: of the dense part over all ranks, 0 where it
    is not known.
    """

    loss: float
    examples: int
    tokens: int
    wait: float
    seconds: float
    flops: int = 0


class Callback:
    """Something with a schedule. Every rank calls every hook, so hooks may communicate."""

    def on_start(self, trainer: "Trainer") -> None: ...

    def on_step(self, trainer: "Trainer", result: StepResult) -> None: ...

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, or after the step at which the run was asked to stop."""


class Trainer:
    """Runs steps until `steps`, until a callback sets `converged`, or until a signal asks it to stop.

    A signal to stop (gr.training.signals) to any rank finishes the step under way on all. A rank whose torchrun died
    asks to stop too: nobody is left to start it again, or to end it.

    stopped: it was asked to; callbacks then leave for the resumed run what would keep the save waiting. owing: this is
    that run, and what was due after `step` is still to be done.
    """

    def __init__(
        self, module: TrainModule, loader: Loader, callbacks: Sequence[Callback], world: World, *, steps: int
    ) -> None:
        self.module, self.callbacks, self.world = module, callbacks, world
        self.pipeline = Pipeline(loader, module, world, steps=steps)
        self.steps = steps
        self.step = 0
        self.stopped = self.owing = self.converged = False
        self._stop_requested = False
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def run(self) -> None:
        """Trains. Raises TrainingError when the loss is not finite, before anything is updated with it."""
        with on_stop_signal(self._request_stop):
            for callback in self.callbacks:
                callback.on_start(self)
            while self.step < self.steps and not (self.stopped or self.converged):
                result = self._one_step()
                self.step += 1
                watchdog.enter(f"callbacks after step {self.step}")
                for callback in self.callbacks:
                    callback.on_step(self, result)
            for callback in self.callbacks:
                callback.on_end(self)

    def _one_step(self) -> StepResult:
        began, waited = time.perf_counter(), self.pipeline.wait_seconds
        watchdog.enter(f"data of step {self.step}", "step")
        prepared = self.pipeline.take(self.step)
        watchdog.enter(f"forward of step {self.step}")
        loss = self.module.forward(prepared)
        self.pipeline.send_next()
        # One collective a step: the global loss, and whether any rank was asked to stop after this step.
        total, stop = self.world.all_reduce_sum([float(loss.total), float(self._stop_requested or self._is_orphan())])
        self.stopped = stop > 0
        if not loss.tokens:
            raise DataError(
                f"step {self.step}: none of its {loss.examples} examples has a target; are the histories shorter than "
                "data.train_holdout allows?"
            )
        if not math.isfinite(total):
            self._refuse(loss, prepared.inputs.batch.first_example)
        watchdog.enter(f"backward of step {self.step}")
        self.module.backward(loss, self.step)
        if not self.stopped:
            watchdog.enter(f"data after step {self.step}")
            self.pipeline.fill(self.step)
        waited, seconds = self.pipeline.wait_seconds - waited, time.perf_counter() - began
        return StepResult(total / loss.tokens, loss.examples, loss.tokens, waited, seconds, prepared.flops)

    def _request_stop(self) -> None:
        self._stop_requested = True
        log.warning(
            "stopping after this step; SIGTERM or Ctrl-C again, %g s after the first, to leave at once",
            ONE_REQUEST_SECONDS,
        )

    def _is_orphan(self) -> bool:
        if self._agent is None or os.getppid() == self._agent:
            return False
        log_once(log, "the torchrun that started this rank has died: stopping after this step")
        return True

    def _refuse(self, loss: StepLoss, first_example: int) -> None:
        raise TrainingError(
            f"loss is not finite at step {self.step}: examples {first_example}..{first_example + loss.examples - 1} "
            f"of the training order, learning rate {self.module.learning_rate:g}; nothing was updated or saved. "
            "Try a lower learning rate, optimizer.clip_grad_norm, or trainer.precision=fp32"
        )

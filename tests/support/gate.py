"""A plugin of gr for tests of interruptions: the run stands still after a step until the test lets it go on.

So a test that stops, kills or preempts a run has all the time that it needs, and the run needs few steps. Ranks that
stand at a gate keep on meeting in collectives, as they do in a step: the loss of a peer shows there, too.
"""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pydantic import PositiveInt

from gr.config.run import CALLBACKS, CallbackConfig

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK_SECONDS = 0.1


class GateConfig(CallbackConfig):
    """after: the step. opened: the file that opens the gate; where it exists already, nothing stands still."""

    kind: Literal["gate"]
    after: PositiveInt
    opened: str


def gates(folder: Path, *steps: int) -> list[str]:
    """Overrides of a configuration: one gate after each of `steps`, in `folder`. The plan without gates is the same."""
    each = [f"{{kind: gate, after: {step}, opened: {gate(folder, step)}}}" for step in steps]
    return [f"plugins=[{__name__}]", f"callbacks=[{', '.join(each)}]"]


def gate(folder: Path, step: int) -> Path:
    """The file that opens the gate after `step`."""
    return folder / f"gate-{step}"


class Gate:
    """A gr.training.trainer.Callback in all but its base, which would load torch for every check of a configuration.

    A signal to stop any rank lets all of them go on, since a run stops after a step. Metrics of the step are written
    before the run stands still, its checkpoint and status.json after that.
    """

    def __init__(self, config: GateConfig) -> None:
        self.config = config
        self.opened = Path(config.opened)
        self.asked = False

    def on_start(self, trainer: Any) -> None:
        """Listens to the signals that the trainer has just begun to listen to; they still reach it."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._listening(signal.getsignal(number)))

    def on_step(self, trainer: Any, result: Any) -> None:
        if trainer.step == self.config.after:
            while not trainer.world.any(self.asked or self.opened.exists()):
                time.sleep(LOOK_SECONDS)

    def on_end(self, trainer: Any) -> None: ...

    def _listening(self, trainers: Any) -> Any:
        def hear(number: int, frame: FrameType | None) -> None:
            self.asked = True
            trainers(number, frame)

        return hear


CALLBACKS.add(GateConfig, f"{__name__}:Gate")

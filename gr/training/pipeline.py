"""The batches of a run, prepared for their step: on a GPU while it still computes the steps before."""

from collections import deque
from typing import Any, Protocol

import torch

from gr.dist import World, on_stream
from gr.training.module import Prepared, TrainModule

AHEAD_ON_GPU = 2


class Loader(Protocol):
    """A loader, as training needs it: batches, its position, and the time it kept the trainer waiting."""

    wait_seconds: float

    def __next__(self): ...

    def state_dict(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Pipeline:
    """The pipeline of torchrec's TrainPipelineSparseDist, without its rewriting of the model.

    While step i is computed, the ids of step i + 1 travel to the ranks that hold their rows, and the batch of step
    i + 2 is taken from the loader and copied to the device. With ahead=0, as on a CPU, whose cores have no time to
    spare, all that is done when a step needs it; results are the same bits.
    """

    def __init__(
        self, loader: Loader, module: TrainModule, world: World, *, steps: int, ahead: int | None = None
    ) -> None:
        """steps: no batch is taken beyond the run's last step. ahead: batches prepared early; None: by device, and none
        where preparing one changes the rows of dynamic ids, which a checkpoint must have as of its step.
        """
        on_gpu = world.device.type == "cuda"
        self._loader, self._module, self._steps = loader, module, steps
        early = AHEAD_ON_GPU if on_gpu and (module.ids is None or not module.ids.dynamic) else 0
        self._ahead = early if ahead is None else ahead
        # Its small kernels are waited for by the host, and so come before those of the steps.
        self._stream = torch.cuda.Stream(priority=-1) if on_gpu else None
        self._prepared: deque[tuple[Prepared, dict[str, Any]]] = deque()
        self._state = loader.state_dict()

    @property
    def wait_seconds(self) -> float:
        """Seconds that the loader has kept the trainer waiting."""
        return self._loader.wait_seconds

    def state_dict(self) -> dict[str, Any]:
        """The loader's, after the batch of the last step that was taken; batches prepared early do not count."""
        return self._state

    def take(self, step: int) -> Prepared:
        """The batch of `step`; begins to send what the next one asks of the tables, if that is prepared."""
        if not self._prepared:
            self._prepare(step)
        prepared, self._state = self._prepared.popleft()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            prepared.inputs.record_stream(torch.cuda.current_stream())
        if self._prepared and (lookup := self._prepared[0][0].lookup) is not None:
            lookup.start()
        return prepared

    def send_next(self) -> None:
        """Sends the ids of the next step to the ranks that hold their rows; waits for other ranks.

        To be called when the forward pass is under way.
        """
        if self._prepared and (lookup := self._prepared[0][0].lookup) is not None:
            lookup.send()

    def fill(self, step: int) -> None:
        """Prepares batches of steps after `step`, when the backward pass is under way.

        What is wrong with them is raised here, up to two steps early, and before the callbacks of `step`.
        """
        first = step + 1 + len(self._prepared)
        for later in range(first, min(step + 1 + self._ahead, self._steps)):
            self._prepare(later)

    def _prepare(self, step: int) -> None:
        batch = next(self._loader)
        state = self._loader.state_dict()
        with on_stream(self._stream):
            self._prepared.append((self._module.prepare(batch, step), state))

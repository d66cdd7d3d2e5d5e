"""The time that the parts of steps take on the device."""

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch


class Phases:
    """Seconds of each part of a step, summed since they were last read.

    On a GPU the host runs ahead, so its clock would tell nothing: events on the stream are timed, and read() waits for
    the last one. enabled: whether anyone reads them.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self._on_gpu, self._enabled = device.type == "cuda", enabled
        self._marks: list[tuple[str | None, Any]] = []  # an event on a GPU, else seconds

    def start(self) -> None:
        """A part begins; what came before is nobody's."""
        self._mark(None)

    def end(self, name: str) -> None:
        """The part of that name ends, and another may begin."""
        self._mark(name)

    def read(self) -> dict[str, float]:
        """`name_seconds` of every part that has ended; starts anew."""
        if self._on_gpu and self._marks:
            torch.cuda.synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for (_, before), (name, after) in pairwise(self._marks):
            if name is not None:
                passed = before.elapsed_time(after) / 1000 if self._on_gpu else after - before
                seconds[f"{name}_seconds"] += passed
        self._marks = []
        return dict(seconds)

    def _mark(self, name: str | None) -> None:
        if not self._enabled:
            return
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

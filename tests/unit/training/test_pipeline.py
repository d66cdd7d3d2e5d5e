"""When batches are prepared, and what a checkpoint says of those that were prepared early."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gr.dist import World
from gr.training.pipeline import Pipeline

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Numbers:
    """A loader of 0, 1, 2, ..., each of which it is waited for a second."""

    def __init__(self) -> None:
        self.taken, self.wait_seconds = 0, 0.0

    def __next__(self) -> int:
        self.taken, self.wait_seconds = self.taken + 1, self.wait_seconds + 1.0
        return self.taken - 1

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def close(self) -> None: ...


class Diary(list):
    """As the train module, whose lookups note what is done to them."""

    def prepare(self, batch: int, step: int) -> Any:
        self.append(("prepare", step))
        assert batch == step
        note = {name: lambda name=name: self.append((name, step)) for name in ("start", "send")}
        return SimpleNamespace(step=step, lookup=SimpleNamespace(**note))


def run(steps: int, ahead: int) -> tuple[Diary, Numbers]:
    diary, loader = Diary(), Numbers()
    feed = Pipeline(loader, diary, ALONE, steps=steps, ahead=ahead)  # type: ignore[arg-type]
    assert feed.state_dict() == {"taken": 0}
    for step in range(steps):
        assert feed.take(step).step == step
        diary.append(("forward", step))
        feed.send_next()
        diary.append(("backward", step))
        feed.fill(step)
        assert feed.state_dict() == {"taken": step + 1}
        assert feed.wait_seconds == loader.taken
    return diary, loader


def test_on_a_cpu_a_batch_is_prepared_when_it_is_needed() -> None:
    diary, loader = run(3, 0)
    assert diary == [(what, step) for step in range(3) for what in ("prepare", "forward", "backward")]
    assert loader.taken == 3


def test_two_ahead() -> None:
    diary, loader = run(4, 2)
    assert diary == [
        *[("prepare", 0), ("forward", 0), ("backward", 0), ("prepare", 1), ("prepare", 2)],
        *[("start", 2), ("forward", 1), ("send", 2), ("backward", 1), ("prepare", 3)],
        *[("start", 3), ("forward", 2), ("send", 3), ("backward", 2)],
        *[("forward", 3), ("backward", 3)],
    ]
    assert loader.taken == 4, "no batch beyond the last step"


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_every_step_has_its_batch(ahead: int) -> None:
    diary, _ = run(7, ahead)
    assert [step for what, step in diary if what == "prepare"] == list(range(7))

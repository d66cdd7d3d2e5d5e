"""The loop on a module and a loader that only keep a diary."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gr.dist import World
from gr.errors import TrainingError
from gr.training import signals as stop
from gr.training.module import Inputs, Prepared, StepLoss
from gr.training.trainer import Callback, StepResult, Trainer
from tests.support.ranks import run_ranks

Diary = list[tuple[Any, ...]]
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class FakeBatch:
    first_example = 320


class FakeLoader:
    """Keeps the trainer waiting for 0.25 s a batch, it says."""

    def __init__(self) -> None:
        self.wait_seconds = 7.0

    def __next__(self) -> FakeBatch:
        self.wait_seconds += 0.25
        return FakeBatch()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


class FakeModule:
    """on_forward(step) may return a total loss; 8 else. 4 tokens and 32 examples a step."""

    learning_rate = 0.5

    def __init__(self, diary: Diary, on_forward: Callable[[int], float | None] = lambda step: None) -> None:
        self.diary, self.on_forward = diary, on_forward

    def prepare(self, batch: FakeBatch, step: int) -> Prepared:
        return Prepared(step, Inputs(batch, None), None, 4, 32)  # type: ignore[arg-type]

    def forward(self, prepared: Prepared) -> StepLoss:
        self.diary.append(("forward", prepared.step))
        total = self.on_forward(prepared.step)
        return StepLoss(torch.zeros(()), torch.tensor(8.0 if total is None else total), tokens=4, examples=32)

    def backward(self, loss: StepLoss, step: int) -> None:
        self.diary.append(("backward", step))


class Noting(Callback):
    def __init__(self, diary: Diary, name: str) -> None:
        self.diary, self.name = diary, name
        self.results: list[StepResult] = []

    def on_start(self, trainer: Trainer) -> None:
        self.diary.append((self.name, "start", trainer.step))

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self.diary.append((self.name, "step", trainer.step))
        self.results.append(result)

    def on_end(self, trainer: Trainer) -> None:
        self.diary.append((self.name, "end", trainer.step))


def make(steps: int, on_forward: Callable[[int], float | None] = lambda step: None, world: World = ALONE):
    diary: Diary = []
    callbacks = [Noting(diary, "a"), Noting(diary, "b")]
    trainer = Trainer(FakeModule(diary, on_forward), FakeLoader(), callbacks, world, steps=steps)
    return trainer, diary, callbacks


def test_order() -> None:
    """Callbacks see the number of steps done, in the order in which they were given; the module sees the step's."""
    trainer, diary, _ = make(2)
    trainer.run()
    assert diary == [
        ("a", "start", 0),
        ("b", "start", 0),
        ("forward", 0),
        ("backward", 0),
        ("a", "step", 1),
        ("b", "step", 1),
        ("forward", 1),
        ("backward", 1),
        ("a", "step", 2),
        ("b", "step", 2),
        ("a", "end", 2),
        ("b", "end", 2),
    ]
    assert not trainer.stopped


def test_what_a_step_reports() -> None:
    trainer, _, (noting, _) = make(2)
    trainer.run()
    assert [r.seconds > 0 for r in noting.results] == [True, True]
    timeless = [replace(result, seconds=0.0) for result in noting.results]
    assert timeless == [StepResult(loss=2.0, examples=32, tokens=4, wait=0.25, seconds=0.0)] * 2


def test_a_callback_may_end_it() -> None:
    trainer, diary, callbacks = make(5)
    callbacks[0].on_step = lambda own, _: setattr(own, "converged", own.step == 2)  # type: ignore[method-assign]
    trainer.run()
    assert trainer.step == 2 and not trainer.stopped and diary[-1] == ("b", "end", 2)


@pytest.mark.parametrize("done", [3, 5, 9])
def test_a_resumed_run_does_what_is_left(done: int) -> None:
    """9: the configuration was changed to fewer steps than are done already."""
    trainer, diary, _ = make(5)
    trainer.step = done
    trainer.run()
    assert [entry for entry in diary if entry[0] == "forward"] == [("forward", step) for step in range(done, 5)]
    assert diary[0] == ("a", "start", done) and diary[-1] == ("b", "end", max(done, 5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_after_the_step_under_way(number: signal.Signals) -> None:
    def own(number: int, frame: object) -> None:
        """In the place of what the tests were started with: nohup ignores SIGHUP."""

    before = signal.signal(number, own)
    trainer, diary, _ = make(9, lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    trainer.run()
    assert trainer.stopped and trainer.step == 4
    assert diary[-5:] == [("backward", 3), ("a", "step", 4), ("b", "step", 4), ("a", "end", 4), ("b", "end", 4)]
    assert signal.signal(number, before) is own


def test_a_run_under_nohup_survives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer, _, _ = make(2, lambda step: os.kill(os.getpid(), signal.SIGHUP))
        trainer.run()
        assert not trainer.stopped and trainer.step == 2 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_whose_torchrun_has_died_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    trainer, _, _ = make(9, lambda step: monkeypatch.setattr(os, "getppid", lambda: 1) if step == 3 else None)
    trainer.run()
    assert trainer.stopped and trainer.step == 4


def test_a_signal_that_torchrun_passes_on_as_well_is_one_request() -> None:
    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer, _, _ = make(9, twice)
    trainer.run()
    assert trainer.stopped and trainer.step == 1


def test_a_second_signal_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(stop, "ONE_REQUEST_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGTERM)
    trainer, diary, _ = make(9, twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert diary[-1] == ("forward", 0) and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_a_launcher_passes_on_late_is_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's SIGTERM reaches a rank at once, launch.node's SIGUSR1 seconds later through torchrun; at a time limit,
    SIGUSR1 comes as a warning, and SIGTERM minutes later.
    """
    monkeypatch.setattr(stop, "ONE_REQUEST_SECONDS", 0.0)
    for numbers in ([signal.SIGTERM, signal.SIGUSR1], [signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM]):
        trainer, _, _ = make(9, lambda step, numbers=numbers: [os.kill(os.getpid(), n) for n in numbers] and None)
        try:
            trainer.run()
        except KeyboardInterrupt:
            pytest.fail("it left at once")
        assert trainer.stopped and trainer.step == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_before_backward(bad: float) -> None:
    trainer, diary, _ = make(5, lambda step: bad if step == 2 else None)
    with pytest.raises(TrainingError) as refusal:
        trainer.run()
    assert diary[-1] == ("forward", 2), "neither backward nor a callback may follow"
    assert str(refusal.value).startswith(
        "loss is not finite at step 2: examples 320..351 of the training order, learning rate 0.5; nothing was updated"
    )
    assert "optimizer.clip_grad_norm" in str(refusal.value)


def stop_or_fail_on_rank_1(world: World) -> list[Any]:
    def signalled(step: int) -> None:
        if world.rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping, _, (noting, _) = make(9, signalled, world)
    stopping.run()
    failing, diary, _ = make(9, lambda step: math.nan if world.rank == 1 and step == 2 else None, world)
    with pytest.raises(TrainingError):
        failing.run()
    return [stopping.step, stopping.stopped, noting.results[0].loss, diary[-1]]


def test_ranks_stop_and_refuse_together() -> None:
    """Else the others would wait for one that has left. The loss is the sum of both ranks over all tokens."""
    assert run_ranks(stop_or_fail_on_rank_1, 2) == [[2, True, 4.0, ("forward", 2)]] * 2

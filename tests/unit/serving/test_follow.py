"""`gr publish --watch`: every checkpoint that becomes the one to serve, once, and a fault of one is not the end."""

from pathlib import Path

import pytest

from gr.errors import ServingError, TransientError
from gr.serving import follow as following
from gr.serving.follow import follow


class Run:
    """A run whose checkpoint is another at every look. faults: what publishing a step raises, the first time."""

    def __init__(self, *steps: int, **faults: Exception) -> None:
        self.steps, self.faults, self.published = list(steps), faults, []

    def resolve(self, path: Path) -> Path:
        if not self.steps:
            raise StopAsyncIteration  # the end of the test
        return path / str(self.steps.pop(0))

    def publish(self, checkpoint: Path, to: Path, *, plugins: tuple[str, ...]) -> str:
        if fault := self.faults.pop(f"at_{checkpoint.name}", None):
            raise fault
        self.published.append(int(checkpoint.name))
        return checkpoint.name


def run_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(following, "resolve", run.resolve)
    monkeypatch.setattr(following, "publish", run.publish)
    exported = []
    with pytest.raises(StopAsyncIteration):
        exported.extend(follow(Path("run"), Path("package"), 1e-6))
    return exported


def test_each_checkpoint_is_published_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(10, 10, 20, 20, 30)
    run_all(run, monkeypatch)
    assert run.published == [10, 20, 30]


def test_one_that_the_gate_refuses_is_left_out_and_a_lock_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(10, 20, 20, 30, 30, at_20=ServingError("the gate fails"), at_30=TransientError("another writes it"))
    run_all(run, monkeypatch)
    assert run.published == [10, 30]


def test_a_fault_of_the_first_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(10, at_10=ServingError("of another form"))
    monkeypatch.setattr(following, "resolve", run.resolve)
    monkeypatch.setattr(following, "publish", run.publish)
    with pytest.raises(ServingError, match="another form"):
        next(follow(Path("run"), Path("package"), 1e-6))

"""status.json of a run folder: how a run stands, for people and launchers. See docs/design/run-contract.md.

running   under way; a run that crashed leaves it behind, so launchers try such a run again
stopped   asked to stop by a signal, saved, resumable
done      every step and the final report
failed    an error that trying again will not cure
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gr.errors import GRError
from gr.files import is_transient, write_json

STATUS = "status.json"
State = Literal["running", "stopped", "done", "failed"]


@dataclass(frozen=True)
class RunError:
    """What ended a run, on the rank that met it first."""

    rank: int
    host: str
    message: str


@dataclass(frozen=True)
class RunStatus:
    """step: steps done, of `steps`. loss: mean of the last log interval. seconds_per_step: its mean, without
    evaluations and checkpoints. checkpoint: step of the last complete one. save_seconds: that the last save of this
    attempt took. updated: Unix seconds.
    """

    state: State
    step: int
    steps: int
    world_size: int
    loss: float | None = None
    seconds_per_step: float | None = None
    checkpoint: int | None = None
    save_seconds: float | None = None
    updated: float = field(default_factory=time.time)
    error: RunError | None = None


def read_status(run_dir: Path) -> RunStatus:
    """Raises GRError where `run_dir` has no status.json or one that is not ours, OSError where another try may help."""
    path = run_dir / STATUS
    try:
        text = path.read_text()
    except OSError as error:
        if is_transient(error):
            raise
        raise GRError(
            f"{path}: {error.strerror}; expected the run_dir of a `gr train` that has started, for example runs/smoke"
        ) from None
    try:
        fields = json.loads(text)
        status = RunStatus(**fields | {"error": RunError(**fields["error"]) if fields["error"] else None})
        if status.state not in get_args(State):
            raise ValueError(f"state {status.state!r}")
    except (ValueError, TypeError, KeyError) as fault:
        raise GRError(f"{path}: not a status of this version of gr ({fault}); start the run again") from None
    return status


class StatusFile:
    """Writes status.json: rank 0 throughout, and the first rank that fails."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def start(self, status: RunStatus) -> None:
        """Replaces what an earlier attempt left."""
        with self._locked():
            self._write(status)

    def update(self, **changes: Any) -> None:
        """Changes some fields. A failure stays: the first rank to fail knows why, the others only that it is gone."""
        with self._locked():
            status = read_status(self.run_dir)
            if status.state != "failed":
                self._write(replace(status, updated=time.time(), **changes))

    def fail(self, error: RunError) -> None:
        self.update(state="failed", error=error)

    def _write(self, status: RunStatus) -> None:
        write_json(self.run_dir / STATUS, asdict(status))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two ranks must not write at once: the slower one would take back what the other said."""
        with (self.run_dir / f".{STATUS}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

"""status.json of a run folder: the state of a run, for people and launchers. See docs/design/run-contract.md.

running   in progress; a run that crashed leaves this state behind, so launchers start such a run again
stopped   a signal stopped the run; it has saved and can resume
done      every step has run and the final report is written
failed    an error ended the run, and trying again will not cure it
"""

import fcntl
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from gr.errors import GRError
from gr.files import DISK_FULL, is_transient, write_json
from gr.logging import get_logger

log = get_logger(__name__)
STATUS = "status.json"
State = Literal["running", "stopped", "done", "failed"]


@dataclass(frozen=True)
class RunError:
    """The error that ended a run, on the rank that met it first."""

    rank: int
    host: str
    message: str


@dataclass(frozen=True)
class RunStatus:
    """The content of status.json.

    step: the steps done, of `steps`, which is 0 until the epochs of a run are counted in steps. loss, seconds_per_step:
    means over the last log interval, the latter without evaluations and checkpoints. checkpoint: the step of the last
    complete checkpoint. save_seconds: the duration of the last save of this attempt. updated: Unix seconds.
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


def _require_types(part: RunStatus | RunError) -> None:
    """TypeError for a field that is not what it declares, ValueError for one that no run can have."""
    for name, declared in get_type_hints(type(part)).items():
        kinds, value = get_args(declared) or (declared,), getattr(part, name)
        if type(value) not in kinds and value not in kinds and not (type(value) is int and float in kinds):
            raise TypeError(f"{name} is {value!r}")
        most = 1e12 if name == "updated" else 2**63 if type(value) is int else math.inf
        if type(value) in (int, float) and not abs(value) < most:
            raise ValueError(f"{name} is {value}")


def read_status(run_dir: Path) -> RunStatus:
    """The status in `run_dir`.

    Raises GRError if there is no status.json or not one of this version of gr, OSError if another try may help.
    """
    path = run_dir / STATUS
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        if is_transient(error):
            raise
        raise GRError(
            f"{path}: {error.strerror}; expected the run_dir of a `gr train` that has started, for example runs/smoke"
        ) from None
    try:
        fields = json.loads(text)
        status = RunStatus(**fields | {"error": RunError(**fields["error"]) if fields["error"] else None})
        _require_types(status)
        if status.error:
            _require_types(status.error)
    except (ValueError, TypeError, KeyError, RecursionError) as fault:
        raise GRError(f"{path}: not a status of this version of gr ({fault}); start the run again") from None
    return status


# What this process wrote last, by run folder.
_written: dict[Path, RunStatus] = {}


class StatusFile:
    """The writer of status.json: rank 0 during the run, and the first rank that fails."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def start(self, status: RunStatus) -> None:
        """Replaces the status of an earlier attempt."""
        with self._locked():
            self._write(status)

    def update(self, **changes: Any) -> None:
        """Changes some fields. A failed state stays: the first rank to fail knows the cause, later ones do not.

        Where another program has removed or overwritten the file, what this process wrote last takes its place.
        """
        with self._locked():
            try:
                status = read_status(self.run_dir)
            except GRError as error:
                if self.run_dir not in _written:
                    raise
                log.warning("%s; it is written anew", error)
                status = _written[self.run_dir]
            if status.state != "failed":
                self._write(replace(status, updated=time.time(), **changes))

    def fail(self, error: RunError) -> None:
        self.update(state="failed", error=error)

    def _write(self, status: RunStatus) -> None:
        path, content = self.run_dir / STATUS, asdict(status)
        try:
            write_json(path, content)
        except OSError as error:
            if error.errno not in DISK_FULL or not path.exists():
                raise
            # The end of a run has to be told on a full disk too: the old file has a block of its own to write into.
            with path.open("r+") as file:
                file.write(json.dumps(content) + "\n")
                file.truncate()
        _written[self.run_dir] = status

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds a lock, since of two ranks that write at once the slower would undo the change of the other."""
        with (self.run_dir / f".{STATUS}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

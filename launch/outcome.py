"""The outcome of an attempt of a job: exit codes, and RUN_DIR as launchers read it (docs/design/run-contract.md)."""

import json
import socket
import time
from pathlib import Path

import click

DONE, CRASHED, FAILED, STOPPED = 0, 1, 2, 75
_OUTCOMES = {"done": DONE, "failed": FAILED, "stopped": STOPPED}
SETTLE_SECONDS = 10.0


def printable(text: str) -> str:
    """`text` on one line, with control characters and line breaks as escapes: parts of it come from files of others."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class NodeError(click.ClickException):
    """An error shown as one line that begins with the node's name. outcome: CRASHED if another try may help."""

    def __init__(self, message: str, outcome: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = outcome  # type: ignore[misc]  # click declares it on the class

    def show(self, file: object = None) -> None:
        click.echo(printable(f"error: {socket.gethostname()}: {self.format_message()}"), err=True)


class Attempt:
    """One attempt of the run in run_dir: its status.json, and whether it left a new checkpoint.

    The status and checkpoints of earlier attempts are recorded at the start and ignored. (Times cannot tell attempts
    apart, since the clocks of two nodes differ.)
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._before, self._saved_before = self._read(), self._saved()

    def outcome(self, *, settle: bool = False) -> int:
        """DONE, FAILED, STOPPED, or CRASHED for anything else. settle: wait for a shared folder to show the end."""
        deadline = time.monotonic() + (SETTLE_SECONDS if settle else 0)
        while (outcome := self._outcome()) == CRASHED and time.monotonic() < deadline:
            time.sleep(0.2)
        return outcome

    def sentence(self) -> str:
        """The end of the run in words, with its error if there is one."""
        status = self._parsed()
        error = status.get("error")
        parts = [error.get(name) for name in ("rank", "host", "message")] if isinstance(error, dict) else []
        why = ": rank {} on {}: {}".format(*parts) if parts else ""
        return f"the run {status.get('state')} at step {status.get('step')} of {status.get('steps')}{why}"

    def crashes(self, job_id: str) -> int:
        """Records a crash of this attempt; returns the crashes of this job in a row without a new checkpoint."""
        path = self._run_dir / "logs" / "crashes.json"
        known = _object(path.read_text(errors="replace")) if path.exists() else {}
        earlier = known.get("crashes", 0) if known.get("job") == job_id and self._saved() <= self._saved_before else 0
        path.write_text(json.dumps({"job": job_id, "crashes": earlier + 1}))
        return earlier + 1

    def _outcome(self) -> int:
        return CRASHED if self._read() == self._before else _OUTCOMES.get(str(self._parsed().get("state")), CRASHED)

    def _parsed(self) -> dict:
        return _object(self._read())

    def _read(self) -> str:
        try:
            return (self._run_dir / "status.json").read_text(errors="replace")
        except OSError:  # the file does not exist yet, or a network folder does not answer, which is no news
            return ""

    def _saved(self) -> set[str]:
        return {path.name for path in self._run_dir.glob("checkpoints/step-*")}


def _object(text: str) -> dict:
    """The JSON object that `text` is; empty for anything else, as a crash or a full disk may leave it."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

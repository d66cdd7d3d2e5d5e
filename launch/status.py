"""RUN_DIR/status.json as launchers see it: what this attempt came to. gr train writes it (docs/launch.md)."""

import json
import time
from pathlib import Path

DONE, CRASHED, FAILED, STOPPED = 0, 1, 2, 75
_OUTCOMES = {"done": DONE, "failed": FAILED, "stopped": STOPPED}
SETTLE_SECONDS = 10.0


class StatusFile:
    """What was in the file before this attempt is not this attempt's: it is remembered, and counts for nothing.

    (Times would not do: the clocks of two nodes differ.)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._read()

    def outcome(self, *, settle: bool = False) -> int:
        """DONE, FAILED, STOPPED, or CRASHED for anything else. settle: wait for a shared folder to show the end."""
        deadline = time.monotonic() + (SETTLE_SECONDS if settle else 0)
        while (outcome := self._outcome()) == CRASHED and time.monotonic() < deadline:
            time.sleep(0.2)
        return outcome

    def sentence(self) -> str:
        """The end of the run in words, with the error where there was one."""
        status = self._parsed()
        error = status.get("error")
        why = f": rank {error['rank']} on {error['host']}: {error['message']}" if error else ""
        state = status.get("state", "left no status")
        return f"the run {state} at step {status.get('step')} of {status.get('steps')}{why}"

    def _outcome(self) -> int:
        return CRASHED if self._read() == self._before else _OUTCOMES.get(self._parsed().get("state", ""), CRASHED)

    def _parsed(self) -> dict:
        text = self._read()
        return json.loads(text) if text else {}

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

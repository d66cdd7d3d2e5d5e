"""The writer of metrics: metrics.jsonl for programs, and the trackers of trainer.writers for people."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gr.logging import get_logger, log_once
from gr.metrics.trackers import Tracker

log = get_logger(__name__)


class MetricsWriter:
    """Writes each record to run_dir/metrics.jsonl and to the trackers.

    A tracker that cannot be reached costs records there, which are counted, and not the run.
    """

    def __init__(self, run_dir: Path, steps_done: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        """steps_done: records that a killed run wrote of later steps are dropped, since these steps run again."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_after(path, steps_done)
        self._lines = path.open("a", buffering=1)
        self._trackers = trackers
        self.lost = 0

    def write(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        """kind: train, validation or test; it prefixes the names in trackers, which get no value that is None."""
        self._lines.write(json.dumps({"step": step, "kind": kind, "time": time.time(), **values}) + "\n")
        numbers = {name: value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            try:
                tracker.write(step, kind, numbers)
            except tracker.faults as error:
                self.lost += 1
                log_once(log, f"{type(tracker).__name__} does not take metrics, metrics.jsonl has them: {error}")

    def close(self) -> None:
        self._lines.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except tracker.faults as error:
                log.warning("%s does not end its run: %s", type(tracker).__name__, error)
        if self.lost:
            log.warning("trackers missed %d records, which metrics.jsonl has", self.lost)


def in_words(metrics: Mapping[str, float | None], names: Iterable[str]) -> str:
    """Some metrics on a line; null for what does not exist."""
    return "  ".join(f"{name} {shown(metrics[name])}" for name in names)


def shown(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def _drop_after(path: Path, steps_done: int) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    if damaged := sum(step is None for step in steps[:-1]):  # the last line may be cut off by a kill
        log.warning("%s: %d lines are no records, as after a power failure: left out", path, damaged)
    whole = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= steps_done]
    if len(whole) < len(lines):
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(b"".join(whole))
        draft.replace(path)


def _step_of(line: bytes) -> int | None:
    """The step of a record, None for a line that is none."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None

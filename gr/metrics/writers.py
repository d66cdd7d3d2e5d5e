"""Writers of metrics: metrics.jsonl for programs, TensorBoard for people."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Writes each record to run_dir/metrics.jsonl and run_dir/tensorboard."""

    def __init__(self, run_dir: Path, steps_done: int = 0) -> None:
        """steps_done: records that a killed run wrote of later steps are dropped, since these steps run again."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_after(path, steps_done)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_done + 1 if steps_done else None)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """kind: train, validation or test; it prefixes the names in TensorBoard."""
        self._lines.write(json.dumps({"step": step, "kind": kind, "time": time.time(), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _drop_after(path: Path, steps_done: int) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps_done]
    if len(complete) < len(lines):
        draft = path.with_name(f".{path.name}")
        draft.write_text("".join(complete))
        draft.replace(path)

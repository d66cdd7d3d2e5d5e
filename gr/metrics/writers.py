"""Where metrics go: metrics.jsonl for programs, TensorBoard for people."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Writes each record to run_dir/metrics.jsonl and run_dir/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lines = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """kind: train, validation or test; it prefixes the names in TensorBoard."""
        self._lines.write(json.dumps({"step": step, "kind": kind, "time": time.time(), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()

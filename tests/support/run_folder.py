"""What a run leaves in its folder."""

import json
from pathlib import Path

from gr.status import read_status


def reason_alone(run_dir: Path) -> str:
    """The reason of a refusal, for whoever started the run; there is nothing half made beside it."""
    status = read_status(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", ".status.json.lock", "status.json"]
    assert status.state == "failed" and status.error is not None
    return status.error.message


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of metrics.jsonl, in file order: a step that ran twice is there twice."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in parsed if line["kind"] == "train"]

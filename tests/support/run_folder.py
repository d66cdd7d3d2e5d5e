"""What a run leaves in its folder when it is refused before it begins."""

from pathlib import Path

from gr.status import read_status


def reason_alone(run_dir: Path) -> str:
    """The reason of the failure, for whoever started the run; there is nothing half made beside it."""
    status = read_status(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", ".status.json.lock", "status.json"]
    assert status.state == "failed" and status.error is not None
    return status.error.message

"""`gr status`: how a run stands, from its folder alone; the same under every scheduler. Imports no torch."""

import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click

from gr.cli.out import dump, say
from gr.status import RunStatus, read_status


@click.command(help="Show how the run of RUN_DIR stands: step, loss, ETA, last checkpoint. Exit code 2 if it has none.")
@click.argument("run_dir")
@click.option("--state", is_flag=True, help="Print one word only: running, stopped, done or failed.")
@click.option("--json", "as_json", is_flag=True, help="Print status.json.")
def command(run_dir: str, state: bool, as_json: bool) -> None:
    status = read_status(Path(run_dir))
    if state:
        say(status.state)
    elif as_json:
        dump(json.dumps(asdict(status), indent=2))
    else:
        say(*describe(status, run_dir, time.time()))


def describe(status: RunStatus, run_dir: str, now: float) -> list[str]:
    """now: Unix seconds."""
    share = 100 * status.step / (status.steps or 1)
    lines = [
        f"{run_dir}: {status.state}",
        f"step        {status.step}/{status.steps} ({share:.0f} %) on {status.world_size} rank(s)",
    ]
    if status.loss is not None:
        lines.append(f"loss        {status.loss:.4f}")
    if status.seconds_per_step is not None:
        left = _duration((status.steps - status.step) * status.seconds_per_step)
        eta = f", ETA {left} without evaluations" if status.state == "running" else ""
        lines.append(f"speed       {status.seconds_per_step:.3g} s/step{eta}")
    saved = "none" if status.checkpoint is None else f"step {status.checkpoint}"
    if status.save_seconds is not None:
        saved += f", the last save took {status.save_seconds:.3g} s"
    lines.append(f"checkpoint  {saved}")
    lines.append(f"updated     {_duration(now - status.updated)} ago")
    if status.error is not None:
        lines.append(f"error       rank {status.error.rank} on {status.error.host}: {status.error.message}")
    return lines


def _duration(seconds: float) -> str:
    if seconds >= 1e13:  # of a file that was changed; Python's durations end soon after
        return "over 300,000 years"
    return str(timedelta(seconds=max(0, round(seconds))))

"""`gr train`: one process, or one of the ranks that torchrun started."""

import json
import os
from pathlib import Path

import click

from gr.cli.report import print_report
from gr.config import load_config


@click.command(help="Train CONFIG; resumes by itself where its run_dir has a checkpoint.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--plan", metavar="PLAN.json", help="Train with a plan of `gr plan --json`; sets planner.plan.")
def command(config: str, overrides: tuple[str, ...], plan: str | None) -> None:
    if plan is not None:
        overrides = (*overrides, f"planner.plan={json.dumps(plan)}")
    loaded = load_config(config, overrides)
    from gr import logging, watchdog
    from gr.dist import use_cpu_well, world
    from gr.experiment import train

    rank, logs = int(os.environ.get("RANK", 0)), Path(loaded.run_dir) / "logs"
    logging.configure(rank)
    limits = loaded.trainer.timeouts.model_dump()
    # The watchdog reports first; the process group ends what it does not watch, such as the final report.
    slowest = max(limits.values()) + 2 * watchdog.GRACE_SECONDS
    with watchdog.watching(limits, logs, rank), world(loaded.device, timeout=slowest, logs=logs) as here:
        use_cpu_well(here)
        report = train(loaded, here)
        if report is not None and here.is_main:
            print_report(report, loaded.run_dir)

"""`gr train`: one process, or one of the ranks that torchrun started."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import click

from gr.config import load_config
from gr.errors import ConfigError


@click.command(help="Train CONFIG; resumes by itself where its run_dir has a checkpoint.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--plan", metavar="PLAN.json", help="Train with a plan of `gr plan --json`; sets planner.plan.")
def command(config: str, overrides: tuple[str, ...], plan: str | None) -> None:
    if plan is not None:
        overrides = (*overrides, f"planner.plan={json.dumps(plan)}")
    loaded = load_config(config, overrides)
    from gr import logging, watchdog
    from gr.cli.report import print_report
    from gr.dist import use_cpu_well, world
    from gr.experiment import train
    from gr.train.run_folder import record_refusal

    rank, logs = int(os.environ.get("RANK", 0)), Path(loaded.run_dir) / "logs"
    logging.configure(rank)
    limits = loaded.trainer.timeouts.model_dump()
    # The watchdog reports first.
    slowest = max(limits.values()) + 2 * watchdog.GRACE_SECONDS
    with watchdog.watching(limits, logs, rank), ExitStack() as stack:
        try:
            here = stack.enter_context(world(loaded.device, timeout=slowest, logs=logs))
        except ConfigError as error:
            record_refusal(loaded, error)
            raise
        use_cpu_well(here)
        report = train(loaded, here)
        if report is not None and here.is_main:
            print_report(report, loaded.run_dir)

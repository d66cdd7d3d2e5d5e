"""`gr train`: one process, or one of the ranks that torchrun started."""

import json

import click

from gr.config import load_config
from gr.environment import whole_number


@click.command(
    help="Train CONFIG, a file or the name of an installed configuration; resumes by itself where its run_dir has a "
    "checkpoint.\n\nKeys and values: `gr config show CONFIG` prints them all, `gr config explain KEY` says what one "
    "means, `gr config list` names the installed configurations."
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--plan", metavar="PLAN.json", help="Train with a plan of `gr plan --json`; sets planner.plan.")
def command(config: str, overrides: tuple[str, ...], plan: str | None) -> None:
    if plan is not None:
        overrides = (*overrides, f"planner.plan={json.dumps(plan)}")
    loaded = load_config(config, overrides)
    from gr import logging
    from gr.api import train

    rank = whole_number("RANK", 0)
    logging.configure(rank)
    report = train(loaded)
    if report is not None and rank == 0:
        from gr.cli.report import print_report

        print_report(report, loaded.run_dir)

"""`gr evaluate`: the metrics of a checkpoint, from the checkpoint and the evaluation data alone."""

from typing import Literal

import click

from gr.cli.checkpoint import checkpoint_and_overrides
from gr.environment import whole_number


@click.command(help="Evaluate CHECKPOINT: a run folder (its best, or else its latest), or one step-XXXXXXXX folder.")
@click.option("--checkpoint", help="CHECKPOINT as an option.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.argument("overrides", nargs=-1, metavar="CHECKPOINT [KEY.PATH=VALUE]...")
def command(
    checkpoint: str | None, split: Literal["validation", "test"], plugins: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    from gr import logging
    from gr.api import evaluate

    rank = whole_number("RANK", 0)
    logging.configure(rank)
    checkpoint, overrides = checkpoint_and_overrides(checkpoint, overrides)
    report = evaluate(checkpoint, overrides, split=split, plugins=plugins)
    if rank == 0:
        from gr.cli.report import print_report

        print_report(report, None)

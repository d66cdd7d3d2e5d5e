"""`gr evaluate`: the metrics of a checkpoint, from the checkpoint and the evaluation data alone."""

from typing import Any

import click

from gr.cli.checkpoint import on_checkpoint


@click.command(help="Evaluate CHECKPOINT: a run folder (its best, or else its latest), or one step-XXXXXXXX folder.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@on_checkpoint
def command(checkpoint: str, overrides: tuple[str, ...], rank: int, **options: Any) -> None:
    from gr.api import evaluate

    report = evaluate(checkpoint, overrides, **options)
    if rank == 0:
        from gr.cli.report import print_report

        print_report(report, None)

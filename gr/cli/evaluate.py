"""`gr evaluate`: the metrics of a checkpoint, from the checkpoint alone."""

from typing import Literal

import click

from gr.config import load_config


@click.command(help="Evaluate a checkpoint: a run folder (its best, or else its latest), or one step-XXXXXXXX folder.")
@click.option("--checkpoint", required=True, help="Run folder or checkpoint folder.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option(
    "--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this one of the checkpoint's plugins."
)
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def command(
    checkpoint: str, split: Literal["validation", "test"], plugins: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    from gr import logging
    from gr.checkpoint import resolve
    from gr.checkpoint.layout import CONFIG, read_progress
    from gr.cli.report import print_report
    from gr.dist import use_cpu_well, world
    from gr.experiment import evaluate

    path = resolve(checkpoint)
    read_progress(path)
    loaded = load_config(str(path / CONFIG), overrides, plugins=plugins)
    with world(loaded.device) as here:
        logging.configure(here.rank)
        use_cpu_well(here)
        report = evaluate(loaded, path, here, split)
        if here.is_main:
            print_report(report, None)

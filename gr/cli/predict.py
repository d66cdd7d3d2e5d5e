"""`gr predict`: what a ranking or click model makes of the rows of a file."""

import os
from pathlib import Path
from typing import Any

import click

from gr.cli.out import check_out


@click.command(
    help="Write the rows of a Parquet file with the model's predictions beside them. Click models read the columns of "
    "their training data and add `score`, the probability of the label. Ranking models read user_id and item_id "
    "(perhaps timestamp and event features) and add score_TASK for each task; histories are those of "
    "evaluation.path, or else data.path. Ids are those of your log."
)
@click.option("--checkpoint", required=True, help="Run folder (its best, or else its latest) or checkpoint folder.")
@click.option("--input", "file", required=True, type=click.Path(path_type=Path), help="Parquet file of rows.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the file.")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def command(checkpoint: str, file: Path, out: Path, force: bool, overrides: tuple[str, ...], **options: Any) -> None:
    from gr import logging
    from gr.api import predict

    check_out(out, force)
    rank = int(os.environ.get("RANK", 0))
    logging.configure(rank)
    counts = predict(checkpoint, file, out, overrides, **options)
    if rank == 0:
        click.echo(f"{out}: {counts.pop('rows'):,} rows")
        for name, count in counts.items():
            if count:
                click.echo(f"{name.replace('_', ' ')}: {count:,}")

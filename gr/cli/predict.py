"""`gr predict`: what a ranking or click model makes of the rows of a file."""

from pathlib import Path
from typing import Any

import click

from gr.cli.checkpoint import checkpoint_and_overrides
from gr.cli.out import check_out, say
from gr.environment import whole_number


@click.command(
    help="Write the rows of a Parquet file with the predictions of CHECKPOINT beside them. Click models read the "
    "columns of their training data and add `score`, the probability of the label. Ranking models read user_id and "
    "item_id (perhaps timestamp and event features) and add score_TASK for each task; histories are those of "
    "evaluation.path, or else data.path. Ids are those of your log."
)
@click.option("--checkpoint", help="CHECKPOINT as an option: run folder (its best, or else its latest) or one of it.")
@click.option("--input", "file", required=True, type=click.Path(path_type=Path), help="Parquet file of rows.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the file.")
@click.argument("overrides", nargs=-1, metavar="CHECKPOINT [KEY.PATH=VALUE]...")
def command(
    checkpoint: str | None, file: Path, out: Path, force: bool, overrides: tuple[str, ...], **options: Any
) -> None:
    from gr import logging
    from gr.api import predict

    checkpoint, overrides = checkpoint_and_overrides(checkpoint, overrides)
    check_out(out, force)
    rank = whole_number("RANK", 0)
    logging.configure(rank)
    counts = predict(checkpoint, file, out, overrides, **options)
    if rank == 0:
        say(f"{out}: {counts.pop('rows'):,} rows")
        for name, count in counts.items():
            if count:
                say(f"{name.replace('_', ' ')}: {count:,}")

"""`gr predict`: what a ranking or click model makes of the rows of a file."""

from pathlib import Path
from typing import Any

import click

from gr.cli.checkpoint import on_checkpoint, writing
from gr.cli.out import say


@click.command(
    help="Write the rows of a Parquet file with the predictions of CHECKPOINT beside them. Click models read the "
    "columns of their training data and add `score`, the probability of the label. Ranking models read user_id and "
    "item_id (perhaps timestamp and event features) and add score_TASK for each task; histories are those of "
    "evaluation.path, or else data.path. Ids are those of your log."
)
@click.option("--input", "file", required=True, type=click.Path(path_type=Path), help="Parquet file of rows.")
@writing("file")
@on_checkpoint
def command(checkpoint: str, overrides: tuple[str, ...], rank: int, file: Path, out: Path, **options: Any) -> None:
    from gr.api import predict

    counts = predict(checkpoint, file, out, overrides, **options)
    if rank == 0:
        say(f"{out}: {counts.pop('rows'):,} rows")
        for name, count in counts.items():
            if count:
                say(f"{name.replace('_', ' ')}: {count:,}")

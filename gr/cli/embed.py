"""`gr embed`: the vectors of items and users, from a checkpoint."""

from pathlib import Path
from typing import Any

import click

from gr.cli.checkpoint import on_checkpoint, writing
from gr.cli.out import say


@click.command(
    help="Write items.parquet and users.parquet of CHECKPOINT: ids of your log and vectors, whose dot product is the "
    "score that `gr recommend` ranks by. The users are those of evaluation.path, or else data.path."
)
@writing("folder")
@on_checkpoint
def command(checkpoint: str, overrides: tuple[str, ...], rank: int, out: Path, **options: Any) -> None:
    from gr.api import embed

    counts = embed(checkpoint, out, overrides, **options)
    if rank == 0:
        say(f"{out}: vectors of {counts['items']:,} items and {counts['users']:,} users")

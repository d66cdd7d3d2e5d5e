"""`gr embed`: the vectors of items and users, from a checkpoint."""

from pathlib import Path
from typing import Any

import click

from gr.cli.checkpoint import checkpoint_and_overrides
from gr.cli.out import check_out, say
from gr.environment import whole_number


@click.command(
    help="Write items.parquet and users.parquet of CHECKPOINT: ids of your log and vectors, whose dot product is the "
    "score that `gr recommend` ranks by. The users are those of evaluation.path, or else data.path."
)
@click.option("--checkpoint", help="CHECKPOINT as an option: run folder (its best, or else its latest) or one of it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the files.")
@click.argument("overrides", nargs=-1, metavar="CHECKPOINT [KEY.PATH=VALUE]...")
def command(checkpoint: str | None, out: Path, force: bool, overrides: tuple[str, ...], **options: Any) -> None:
    from gr import logging
    from gr.api import embed

    checkpoint, overrides = checkpoint_and_overrides(checkpoint, overrides)
    check_out(out, force)
    rank = whole_number("RANK", 0)
    logging.configure(rank)
    counts = embed(checkpoint, out, overrides, **options)
    if rank == 0:
        say(f"{out}: vectors of {counts['items']:,} items and {counts['users']:,} users")

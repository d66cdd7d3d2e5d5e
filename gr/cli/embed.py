"""`gr embed`: the vectors of items and users, from a checkpoint."""

import os
from pathlib import Path
from typing import Any

import click

from gr.cli.out import check_out


@click.command(
    help="Write items.parquet and users.parquet: ids of your log and vectors, whose dot product is the score that `gr "
    "recommend` ranks by. The users are those of evaluation.path, or else data.path."
)
@click.option("--checkpoint", required=True, help="Run folder (its best, or else its latest) or checkpoint folder.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the files.")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def command(checkpoint: str, out: Path, force: bool, overrides: tuple[str, ...], **options: Any) -> None:
    from gr import logging
    from gr.api import embed

    check_out(out, force)
    rank = int(os.environ.get("RANK", 0))
    logging.configure(rank)
    counts = embed(checkpoint, out, overrides, **options)
    if rank == 0:
        click.echo(f"{out}: vectors of {counts['items']:,} items and {counts['users']:,} users")

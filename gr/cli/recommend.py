"""`gr recommend`: the best items of every user, from a checkpoint."""

from pathlib import Path
from typing import Any

import click

from gr.cli.checkpoint import checkpoint_and_overrides
from gr.cli.out import check_out, say
from gr.environment import whole_number


@click.command(
    help="Write the best items of every user, by CHECKPOINT, as one Parquet file: user_id, item_id, score, place, in "
    "the ids of your log. The users are those of evaluation.path, or else data.path. Items that evaluation.filter_seen "
    "forbids are left out."
)
@click.option("--checkpoint", help="CHECKPOINT as an option: run folder (its best, or else its latest) or one of it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--k", type=click.IntRange(1), default=20, show_default=True, help="Items a user.")
@click.option(
    "--users", type=click.Path(path_type=Path), help="Parquet file of users: user_id, and perhaps k instead of --k."
)
@click.option("--items", type=click.Path(path_type=Path), help="Parquet file of the items allowed: item_id.")
@click.option("--holdout", type=click.IntRange(0, 1), default=0, show_default=True, help="Newest events left out.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the file.")
@click.argument("overrides", nargs=-1, metavar="CHECKPOINT [KEY.PATH=VALUE]...")
def command(checkpoint: str | None, out: Path, force: bool, overrides: tuple[str, ...], **options: Any) -> None:
    from gr import logging
    from gr.api import recommend

    checkpoint, overrides = checkpoint_and_overrides(checkpoint, overrides)
    check_out(out, force)
    rank = whole_number("RANK", 0)
    logging.configure(rank)
    counts = recommend(checkpoint, out, overrides, **options)
    if rank == 0:
        say(f"{out}: {counts['rows']:,} rows, {counts['users']:,} users")
        if counts["without_history"]:
            say(f"{counts['without_history']:,} users have no history: nothing is recommended to them")
        for noun in ("users", "items"):
            if unknown := counts[f"unknown_{noun}"]:
                say(f"{unknown:,} {noun} of --{noun} are not in the data")

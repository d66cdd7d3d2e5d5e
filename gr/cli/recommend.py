"""`gr recommend`: the best items of every user, from a checkpoint."""

from pathlib import Path
from typing import Any

import click

from gr.cli.checkpoint import on_checkpoint, writing
from gr.cli.out import say


@click.command(
    help="Write the best items of every user, by CHECKPOINT, as one Parquet file: user_id, item_id, score, place, in "
    "the ids of your log. The users are those of evaluation.path, or else data.path. Items that evaluation.filter_seen "
    "forbids are left out."
)
@click.option("--k", type=click.IntRange(1), default=20, show_default=True, help="Items a user.")
@click.option(
    "--users", type=click.Path(path_type=Path), help="Parquet file of users: user_id, and perhaps k instead of --k."
)
@click.option("--items", type=click.Path(path_type=Path), help="Parquet file of the items allowed: item_id.")
@click.option(
    "--cold",
    type=click.Choice(["nothing", "popularity"]),
    default="nothing",
    show_default=True,
    help="What users get that have no history or are not in the data.",
)
@click.option("--holdout", type=click.IntRange(0, 1), default=0, show_default=True, help="Newest events left out.")
@writing("file")
@on_checkpoint
def command(checkpoint: str, overrides: tuple[str, ...], rank: int, out: Path, **options: Any) -> None:
    from gr.api import recommend

    counts = recommend(checkpoint, out, overrides, **options)
    if rank == 0:
        given = (
            "they get the most frequent items" if options["cold"] == "popularity" else "nothing is recommended to them"
        )
        say(f"{out}: {counts['rows']:,} rows, {counts['users']:,} users")
        if counts["without_history"]:
            say(f"{counts['without_history']:,} users have no history: {given}")
        for noun in ("users", "items"):
            if unknown := counts[f"unknown_{noun}"]:
                say(f"{unknown:,} {noun} of --{noun} are not in the data")

"""`gr recommend`: the best items of every user, from a checkpoint."""

from pathlib import Path
from typing import Literal, cast

import click

from gr.cli.checkpoint import checkpoint_and_overrides
from gr.cli.out import check_out, say
from gr.environment import whole_number


@click.command(
    help="Write the best items of every user, by CHECKPOINT, as one Parquet file: user_id, item_id, score, place. The "
    "users are those of evaluation.path, or else data.path; items that evaluation.filter_seen forbids are left out."
)
@click.option("--checkpoint", help="CHECKPOINT as an option: run folder (its best, or else its latest) or one of it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--k", type=click.IntRange(1), default=20, show_default=True, help="Items a user.")
@click.option("--holdout", type=click.IntRange(0, 1), default=0, show_default=True, help="Newest events left out.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the file.")
@click.argument("overrides", nargs=-1, metavar="CHECKPOINT [KEY.PATH=VALUE]...")
def command(
    checkpoint: str | None,
    out: Path,
    k: int,
    holdout: int,
    plugins: tuple[str, ...],
    force: bool,
    overrides: tuple[str, ...],
) -> None:
    from gr import logging
    from gr.api import recommend

    checkpoint, overrides = checkpoint_and_overrides(checkpoint, overrides)
    check_out(out, force)
    rank = whole_number("RANK", 0)
    logging.configure(rank)
    counts = recommend(checkpoint, out, overrides, k=k, holdout=cast(Literal[0, 1], holdout), plugins=plugins)
    if rank == 0:
        say(f"{out}: {counts['rows']:,} rows, {counts['users']:,} users")
        if counts["without_history"]:
            say(f"{counts['without_history']:,} users have no history: nothing is recommended to them")

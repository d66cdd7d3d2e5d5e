"""`gr baselines`: what popularity, item-kNN, a Markov chain and EASE^R score on a data folder."""

from pathlib import Path
from typing import Literal

import click

from gr.cli.out import cell, say, show
from gr.errors import DataError

_COLUMNS = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")


@click.command()
@click.argument("data_dir", type=click.Path(path_type=Path))
@click.option(
    "--evaluation", type=click.Path(path_type=Path), help="Other data folder to evaluate on, as test/ of a stream."
)
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    default="test",
    show_default=True,
    help="Target: the newest event (test) or the one before (validation).",
)
@click.option("--filter-seen", type=click.Choice(["window", "all", "none"]), default="all", show_default=True)
@click.option("--max-length", type=click.IntRange(min=1), default=200, show_default=True, help="Newest events seen.")
@click.option(
    "--train-holdout",
    type=click.IntRange(min=0),
    help="Newest events of each user not fitted on. Default: the target and what follows it; 0 with --evaluation.",
)
def command(
    data_dir: Path,
    evaluation: Path | None,
    split: str,
    filter_seen: Literal["window", "all", "none"],
    max_length: int,
    train_holdout: int | None,
) -> None:
    """Score popularity, item-kNN, Markov and EASE^R on the same split, candidates and seen items as a model.

    Full ranking over the corpus; ties get their mean rank. The settings of each are those that do best on the event
    before the target.
    """
    from rich.table import Table

    from gr.data.dataset import Dataset
    from gr.metrics.retrieval import retrieval_metrics
    from gr.recipes.baselines import BASELINES, Targets, evaluate_baselines

    target: Literal[1, 2] = 1 if split == "test" else 2
    train = Dataset.open(data_dir)
    held_out = Dataset.open(evaluation) if evaluation else train
    holdout = train_holdout if train_holdout is not None else (0 if evaluation else target)
    scored = evaluate_baselines(
        train, Targets(held_out, target, filter_seen, max_length), names=BASELINES, train_holdout=holdout
    )
    users = len(scored["popularity"].rank_B)
    if not users:
        raise DataError(f"{held_out.path}: no user has an event before the held-out one, so there is nothing to score")
    title = f"{held_out.path}, {split}: {users} users, filter_seen={filter_seen}, train_holdout={holdout}"
    table = Table(title=cell(title))
    table.add_column("baseline")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for name, each in scored.items():
        metrics = retrieval_metrics(each.rank_B)
        table.add_row(name, *(f"{metrics[column]:.4f}" for column in _COLUMNS))
    show(table, width=100)  # narrower would cut numbers off
    say(*(f"{name}: {each.setting}" for name, each in scored.items() if each.setting))

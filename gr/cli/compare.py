"""`gr compare`: runs side by side. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

import click

from gr.cli.out import check_picture, say, writes
from gr.errors import ConfigError

if TYPE_CHECKING:
    from gr.metrics.compare import Run


@click.command()
@click.argument("run_dirs", nargs=-1, metavar="RUN RUN [RUN]...", type=click.Path(path_type=Path))
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the runs.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="Draw loss and held-out metrics by step as this .png, .pdf or .svg.",
)
def command(run_dirs: tuple[Path, ...], plugins: tuple[str, ...], picture: Path | None) -> None:
    """Compare run folders with the first of them: configurations, metrics, and a paired test on the same users.

    The test is of HR@10 and NDCG@10 of finished retrieval runs: p is how often users whose differences change sign at
    random differ as much.
    """
    if not 2 <= len(run_dirs) <= len(ascii_uppercase):
        raise ConfigError(f"gr compare takes 2 to {len(ascii_uppercase)} run folders, got {len(run_dirs)}")
    if picture is not None:
        check_picture(picture)
    from gr import logging
    from gr.metrics.compare import Run

    logging.configure()
    runs = [Run.open(path, plugins) for path in run_dirs]
    letters = ascii_uppercase[: len(runs)]
    for letter, run in zip(letters, runs, strict=True):
        say(f"{letter}  {run.path}{'' if run.report else ', not done'}")
    _print_configurations(runs, letters)
    _print_metrics(runs, letters)
    _print_paired(runs, letters)
    if picture is not None:
        from gr.metrics.curves import draw

        with writes("picture", picture):
            draw(runs, [f"{letter} {run.path.name}" for letter, run in zip(letters, runs, strict=True)], picture)


def _print_configurations(runs: Sequence["Run"], letters: str) -> None:
    from gr.config import differences

    for letter, run in zip(letters[1:], runs[1:], strict=True):
        changes = differences(runs[0].config, run.config)
        changes.pop("run_dir", None)
        say("", f"configuration, {letters[0]} -> {letter}{'' if changes else ': the same'}")
        for path, (before, after) in changes.items():
            say(f"  {path}: {before} -> {after}")


def _print_metrics(runs: Sequence["Run"], letters: str) -> None:
    from gr.metrics.compare import common

    kind, metrics = common(runs)
    if not metrics:
        say("", "no metric is in all of these runs")
        return
    columns = [*letters, *(f"{letter} - {letters[0]}" for letter in letters[1:])]
    width = max(map(len, metrics))
    say("", f"{kind} metrics")
    say("  " + " " * width + "".join(f"{column:>12}" for column in columns))
    for name, values in metrics.items():
        numbers = [f"{value:>12,.5g}" for value in values]
        numbers += [f"{value - values[0]:>+12,.4g}" for value in values[1:]]
        say(f"  {name:<{width}}" + "".join(numbers))


def _print_paired(runs: Sequence["Run"], letters: str) -> None:
    from gr.metrics.compare import paired, unpaired

    for letter, run in zip(letters[1:], runs[1:], strict=True):
        heading = f"paired, {letter} - {letters[0]}"
        if reason := unpaired(runs[0], run):
            say("", f"{heading}: no test, since {reason}")
            continue
        assert runs[0].ranks is not None and run.ranks is not None, "asked above"
        say("", f"{heading}, {len(run.ranks):,} users: difference +- standard error, p of no difference")
        for test in paired([runs[0].ranks], [run.ranks]):
            say(f"  {test.name:<8} {test.difference:+.4f} +- {test.error:.4f}  p {test.p:.2g}")

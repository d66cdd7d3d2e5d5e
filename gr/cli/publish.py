"""`gr publish`: the weights of a checkpoint into a package that is served."""

from pathlib import Path

import click

from gr.cli.checkpoint import on_checkpoint
from gr.cli.export import report


@click.command(
    help="Write the weights of CHECKPOINT as a further version of a package, in the types that the package was "
    "exported with, and serve it. Nothing is compiled; a checkpoint of another form is refused.\n\nWith --watch, each "
    "further checkpoint that becomes the best of the run, or else its latest, is published as it comes, until Ctrl-C."
)
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder of the package.")
@click.option("--watch", is_flag=True, help="Follow the run: CHECKPOINT is its folder.")
@click.option(
    "--every", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds between looks."
)
@on_checkpoint
def command(
    checkpoint: str,
    overrides: tuple[str, ...],
    rank: int,
    to: Path,
    plugins: tuple[str, ...],
    watch: bool,
    every: float,
) -> None:
    if overrides:
        raise click.UsageError(f"{overrides[0]}: values are those of `gr export`, and stay as they are in the package")
    if not watch:
        from gr.serving.export import publish

        report(to, publish(checkpoint, to, plugins=plugins))
        return
    from gr.serving.follow import follow

    for exported in follow(checkpoint, to, every, plugins=plugins):
        report(to, exported)

"""`gr publish`: the weights of a checkpoint into a package that is served."""

from pathlib import Path

import click

from gr.cli.checkpoint import on_checkpoint
from gr.cli.export import report


@click.command(
    help="Write the weights of CHECKPOINT as a further version of a package, in the types that the package was "
    "exported with, and serve it. Nothing is compiled; a checkpoint of another form is refused."
)
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder of the package.")
@on_checkpoint
def command(checkpoint: str, overrides: tuple[str, ...], rank: int, to: Path, plugins: tuple[str, ...]) -> None:
    if overrides:
        raise click.UsageError(f"{overrides[0]}: values are those of `gr export`, and stay as they are in the package")
    from gr.serving.export import publish

    report(to, publish(checkpoint, to, plugins=plugins))

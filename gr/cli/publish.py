"""`gr publish`: the weights of a checkpoint into a package that is served, or what changed since a step as a delta."""

from pathlib import Path

import click

from gr.cli.checkpoint import on_checkpoint
from gr.cli.export import report
from gr.cli.lazy import FiniteRange
from gr.cli.out import say, writes
from gr.units import size


@click.command(
    help="Write the weights of CHECKPOINT as a further version of the package --to, in the types that the package was "
    "exported with, and serve it. Nothing is compiled; a checkpoint of another form is refused.\n\nWith --watch, each "
    "further checkpoint that becomes the best of the run, or else its latest, is published as it comes, until Ctrl-C."
    "\n\nWith --since, write what changed since that step of the run: into the package, which must serve that step, or "
    "as the next delta of the folder --out, which `gr apply` puts on a checkpoint."
)
@click.option("--to", type=click.Path(path_type=Path), help="Folder of the package.")
@click.option(
    "--watch",
    is_flag=False,
    flag_value=10.0,
    type=FiniteRange(0, min_open=True),
    metavar="[SECONDS]",
    help="Follow the run, whose folder CHECKPOINT is; look for another every 10 seconds, or as often as is said.",
)
@click.option("--since", type=click.IntRange(min=0), help="Step of an earlier checkpoint of the run.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of deltas, which are numbered.")
@on_checkpoint
def command(
    checkpoint: str,
    overrides: tuple[str, ...],
    rank: int,
    to: Path | None,
    watch: float | None,
    since: int | None,
    out: Path | None,
    plugins: tuple[str, ...],
) -> None:
    if overrides:
        raise click.UsageError(f"{overrides[0]}: values are those of `gr export`, and stay as they are in the package")
    if (to is None) == (out is None) or (out is not None and since is None):
        raise click.UsageError("give --to PACKAGE for a version of it, or --since STEP with --out FOLDER for a delta")
    if watch and since is not None:
        raise click.UsageError("--watch publishes whole versions, and --since one that follows a step: leave one out")
    if to is None:
        if watch:
            raise click.UsageError("--watch goes with --to PACKAGE")
        from gr.checkpoint import resolve
        from gr.checkpoint.delta import publish_delta

        assert since is not None and out is not None
        with writes("out", out):
            out.mkdir(parents=True, exist_ok=True)
        delta, manifest = publish_delta(resolve(checkpoint), since, out)
        stored = sum(path.stat().st_size for path in delta.rglob("*") if path.is_file())
        rows = ", ".join(f"{count:,} rows of {table}" for table, count in manifest.rows.items()) or "no rows"
        deleted = "".join(f", {count:,} ids of {table} deleted" for table, count in manifest.deleted.items())
        say(f"{delta}: steps {since} to {manifest.step}, {rows}{deleted}, {size(stored)}")
    elif watch:
        from gr.serving.follow import follow

        for exported in follow(checkpoint, to, watch, plugins=plugins):
            report(to, exported)
    else:
        from gr.serving.export import publish

        report(to, publish(checkpoint, to, plugins=plugins, since=since))

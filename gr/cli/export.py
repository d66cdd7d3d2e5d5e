"""`gr export`: a checkpoint -> a package that is served."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gr.cli.checkpoint import on_checkpoint
from gr.cli.out import say

if TYPE_CHECKING:
    from gr.serving.export import Exported


@click.command(
    help="Write CHECKPOINT as a package to serve it from: compiled passes, packed tables, vocabularies, golden rows. "
    "Where OUT is a package already, it gets a further version.\n\nValues: tables.dtype=fp32|fp16|int8|int4|int2, "
    "tables.own.TABLE=..., dense=fp32|bf16, unknown=zero|reject, keep=N; of retrieval "
    "models index.kind=exact|approximate, index.recall=0.97."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the package.")
@on_checkpoint
def command(checkpoint: str, overrides: tuple[str, ...], rank: int, out: Path, plugins: tuple[str, ...]) -> None:
    from gr.config.export import load_export_config

    config = load_export_config(overrides)
    from gr.serving.export import export

    exported = export(checkpoint, out, config, plugins=plugins)
    say("code: compiled" if exported.compiled else "code: as it was, the form is the same")
    report(out, exported)


def report(out: Path, exported: "Exported") -> None:
    """Prints what a package serves now."""
    tables = exported.manifest.tables
    size, full = (
        sum(table.bytes for table in tables.values()),
        sum(4 * table.rows * table.dim for table in tables.values()),
    )
    kinds = sorted({table.dtype for table in tables.values()})
    say(f"tables: {', '.join(kinds)}, {size:,} of {full:,} bytes ({size / full:.2f})")
    if exported.manifest.gate is None:
        say("accuracy: not measured on data")
    say(f"{out}: serves {exported.stored.weights}")

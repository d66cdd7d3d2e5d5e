"""`gr export`: a checkpoint -> a package that is served."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gr.cli.checkpoint import on_checkpoint
from gr.cli.out import check_picture, say, writes

if TYPE_CHECKING:
    from gr.serving.export import Exported


@click.command(
    help="Write CHECKPOINT as a package to serve it from: compiled passes, packed tables, vocabularies, golden rows. "
    "Where OUT is a package already, it gets a further version.\n\nValues: tables.dtype=auto|fp32|fp16|int8|int4|int2, "
    "tables.own.TABLE=..., gate.data=FOLDER, gate.rows=N, dense=fp32|bf16|auto, unknown=zero|reject, keep=N; of click "
    "models cards=K, card_bytes=N; of retrieval models index.kind=exact|approximate, index.recall=0.97."
)
@click.option(
    "--max-ne-increase",
    type=float,
    help="Relative change of NE that is allowed, up or down; sets gate.max_ne_increase.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="With auto: the sensitivity of each table and dense layer, as .png or .pdf.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the package.")
@on_checkpoint
def command(
    checkpoint: str,
    overrides: tuple[str, ...],
    rank: int,
    out: Path,
    plugins: tuple[str, ...],
    max_ne_increase: float | None,
    picture: Path | None,
) -> None:
    from gr.config.export import load_export_config

    if max_ne_increase is not None:
        overrides = (*overrides, f"gate.max_ne_increase={max_ne_increase}")
    config = load_export_config(overrides)
    if picture is not None:
        if "auto" not in (config.tables.dtype, config.dense):
            raise click.UsageError("--picture is of what tables.dtype=auto or dense=auto measures")
        check_picture(picture)
    from gr.serving.export import export

    exported = export(checkpoint, out, config, plugins=plugins)
    if exported.choice is not None:
        for each in exported.choice.sensitivities:
            chosen = " (chosen)" if exported.choice.kinds[each.part] == each.kind else ""
            say(f"{each.part} {each.kind}: {each.bytes:,} bytes, divergence {100 * each.sensitivity:.5f} %{chosen}")
    if picture is not None and exported.choice is not None:
        from gr.serving.gate.pictures import draw_sensitivities

        with writes("picture", picture):
            draw_sensitivities(exported.choice, picture)
    say("code: compiled" if exported.compiled else "code: as it was, the form is the same")
    report(out, exported)


def report(out: Path, exported: "Exported") -> None:
    """Prints what a package serves now."""
    from gr.cli.plan_serving import say_tables

    say_tables(exported.manifest)
    gate = exported.manifest.gate
    if gate is None:
        say("accuracy: not measured (gate.rows=0)")
    else:
        for task in gate["tasks"]:
            changes = (f"{each['name']} {each['change']:+.2g} +- {each['error']:.1g}" for each in task["measures"])
            say(f"accuracy: {gate['verdict']}, {task['task']} of {task['rows']:,} rows: {', '.join(changes)}")
    say(f"{out}: serves {exported.stored.weights}")

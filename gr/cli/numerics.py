"""`gr numerics`: where fewer bits change a model, layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gr.cli.out import cell, check_picture, say, show, writes
from gr.errors import ConfigError

if TYPE_CHECKING:
    from gr.serving.gate.numerics import LayerDifference

_DTYPES = ("fp16", "int8", "int4", "int2", "bf16")


@click.command(
    help="Compare the layers of a saved model with those of the same model in the types that PACKAGE was exported "
    "with, or with rows of --dtype in all tables (bf16: all dense layers), on rows that it was not trained on: "
    "signal-to-noise ratio, largest "
    "error, and the first layer that differs."
)
@click.argument("package", required=False, type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, help="Run folder (its best, or else its latest) or a checkpoint of one.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--dtype", "kind", type=click.Choice(_DTYPES), help="Instead of a package.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the rows, in place of what was held out.")
@click.option("--rows", type=click.IntRange(min=1), default=1000, show_default=True, help="How many, at least.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the ratios as this .png, .pdf or .svg.")
def command(package: Path | None, checkpoint: str, kind: Any, picture: Path | None, **options: Any) -> None:
    if (package is None) == (kind is None):
        raise ConfigError("gr numerics takes PACKAGE or --dtype, and not both")
    if picture is not None:
        check_picture(picture)
    from gr import logging
    from gr.serving.gate.numerics import package_layers, rounded_layers

    logging.configure()
    if package is not None:
        layers = package_layers(package, checkpoint, **options)
    else:
        layers = rounded_layers(checkpoint, kind, **options)
    _print(layers)
    if picture is not None:
        from gr.serving.gate.pictures import draw_layers

        with writes("picture", picture):
            draw_layers(layers, picture)


def _print(layers: Sequence["LayerDifference"]) -> None:
    from rich.table import Column, Table

    from gr.serving.gate.numerics import first_that_differs

    headings = (Column("layer"), Column("module"), *(Column(name, justify="right") for name in _NUMBERS))
    table = Table(*headings, box=None)
    for layer in layers:
        numbers = (f"{layer.values:,}", f"{layer.signal:.3g}", f"{layer.largest:.3g}", _decibels(layer.snr))
        table.add_row(cell(layer.layer), cell(layer.kind), *numbers)
    show(table, width=100)
    first = first_that_differs(layers)
    say("", "no layer differs" if first is None else f"the first layer that differs: {first.layer}")


_NUMBERS = ("values", "signal (rms)", "largest error", "SNR, dB")


def _decibels(snr: float) -> str:
    return {float("inf"): "equal", float("-inf"): "not finite"}.get(snr, f"{snr:.1f}")

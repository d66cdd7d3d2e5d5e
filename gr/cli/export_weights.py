"""`gr export-weights`: the weights of a checkpoint as one safetensors file, in the model's own plain names."""

from pathlib import Path

import click

from gr.cli.checkpoint import on_checkpoint, writing
from gr.cli.out import say, writes
from gr.units import size


@click.command(
    help="Write the weights of CHECKPOINT as OUT (.safetensors), with its schema and configuration in the header."
)
@writing("file")
@on_checkpoint
def command(checkpoint: str, overrides: tuple[str, ...], rank: int, out: Path, plugins: tuple[str, ...]) -> None:
    from gr.errors import ConfigError

    if overrides:
        raise click.UsageError(f"{overrides[0]}: one checkpoint, and no values of the configuration")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out={out}: name a file that ends with .safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from gr.config import dump_config
    from gr.models.saved import load

    saved = load(checkpoint, plugins=plugins)
    tensors = {name: tensor.contiguous() for name, tensor in saved.model.state_dict().items()}
    if saved.id_map is not None:
        tensors |= saved.id_map.raw_ids()
    header = {"format": "pt", "schema": saved.schema.model_dump_json(), "config": dump_config(saved.config)}
    with writes("out", out, SafetensorError):
        save_file(tensors, out, metadata=header)
    written = sum(tensor.nbytes for tensor in tensors.values())
    say(f"{out}: {len(tensors)} tensors, {size(written)}")

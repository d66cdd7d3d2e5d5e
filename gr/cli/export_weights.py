"""`gr export-weights`: the weights of a checkpoint as one safetensors file, in the model's own plain names."""

from pathlib import Path

import click

from gr.cli.checkpoint import checkpoint_and_overrides
from gr.cli.out import check_out, say


@click.command(
    help="Write the weights of CHECKPOINT as OUT (.safetensors), with its schema and configuration in the header."
)
@click.option("--checkpoint", help="CHECKPOINT as an option: run folder (its best, or else its latest) or one of it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the file.")
@click.argument("arguments", nargs=-1, metavar="CHECKPOINT")
def command(
    checkpoint: str | None, out: Path, plugins: tuple[str, ...], force: bool, arguments: tuple[str, ...]
) -> None:
    checkpoint, more = checkpoint_and_overrides(checkpoint, arguments)
    if more:
        raise click.UsageError(f"{more[0]}: one checkpoint, and no values of the configuration")
    from gr.errors import ConfigError

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out={out}: name a file that ends with .safetensors")
    check_out(out, force)
    from safetensors.torch import save_file

    from gr.config import dump_config
    from gr.models.saved import load

    saved = load(checkpoint, plugins=plugins)
    tensors = {name: tensor.contiguous() for name, tensor in saved.model.state_dict().items()}
    header = {"format": "pt", "schema": saved.schema.model_dump_json(), "config": dump_config(saved.config)}
    try:
        save_file(tensors, out, metadata=header)
    except OSError as error:
        raise ConfigError(f"--out={out}: cannot be written: {error.strerror}") from None
    size = sum(tensor.nbytes for tensor in tensors.values())
    say(f"{out}: {len(tensors)} tensors, {size / 1e6:,.1f} MB")

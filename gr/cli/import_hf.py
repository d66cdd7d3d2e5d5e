"""`gr import-hf`: a folder of Hugging Face's save_pretrained() as a checkpoint."""

from pathlib import Path

import click

from gr.cli.out import say, writes
from gr.units import size


@click.command(
    help="Read the Llama in FOLDER (config.json, safetensors) as a checkpoint in OUT, for gr.load, gr export-hf and "
    "checkpoint.load_from."
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folder to write.")
@click.option(
    "--interleaved", is_flag=True, help="The columns of rotary positions are interleaved, as in Meta's files."
)
def command(folder: Path, out: Path, interleaved: bool) -> None:
    from gr.models.imported import import_llama

    with writes("out", out):
        out.mkdir(parents=True, exist_ok=True)
    path, read = import_llama(folder, out, interleaved=interleaved)
    say(f"{path}: {size(read)} read")

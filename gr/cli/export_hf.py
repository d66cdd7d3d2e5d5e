"""`gr export-hf`: a causal language model as a folder that Hugging Face's from_pretrained() reads."""

from pathlib import Path

import click

from gr.cli.checkpoint import on_checkpoint, writing
from gr.cli.out import say, writes
from gr.units import size


@click.command(
    help="Write the causal language model of CHECKPOINT as the folder OUT: config.json, safetensors, tokenizer.json."
)
@writing("folder")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--shard-mb", type=click.IntRange(1), default=5000, show_default=True, help="Size of a file at most.")
@on_checkpoint
def command(
    checkpoint: str,
    overrides: tuple[str, ...],
    rank: int,
    out: Path,
    plugins: tuple[str, ...],
    dtype: str,
    shard_mb: int,
) -> None:
    if overrides:
        raise click.UsageError(f"{overrides[0]}: one checkpoint, and no values of the configuration")
    import torch
    from safetensors import SafetensorError

    from gr.config.causal_lm import CausalLMConfig
    from gr.errors import ConfigError
    from gr.files import write_json
    from gr.models.convert import hf_llama
    from gr.models.saved import load
    from gr.schema import TOKENIZER_FILE

    saved = load(checkpoint, plugins=plugins)
    if not isinstance(saved.config, CausalLMConfig):
        raise ConfigError(f"{checkpoint} is a {saved.config.kind} model: only causal_lm models are written for others")
    written_as = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    fields = hf_llama.hf_config(saved.config, saved.schema, written_as)
    with writes("out", out, SafetensorError):
        out.mkdir(parents=True, exist_ok=True)
        written = hf_llama.save_weights(saved.model, out, dtype=written_as, shard_bytes=shard_mb * 1_000_000)
        write_json(out / hf_llama.CONFIG, fields)
        if (tokenizer := hf_llama.tokenizer_of(saved.folder)) is not None:
            (out / TOKENIZER_FILE).write_bytes(tokenizer)
    say(f"{out}: {size(written)}")

"""`gr apply`: a checkpoint and the deltas that follow it, as a checkpoint."""

from pathlib import Path

import click

from gr.cli.out import say, writes


@click.command()
@click.argument("base")
@click.argument("deltas", nargs=-1, required=True, metavar="DELTA...", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoint to write.")
def command(base: str, deltas: tuple[Path, ...], out: Path) -> None:
    """Write checkpoint BASE with each DELTA of `gr publish --since` as a checkpoint, equal to the published one.

    Every bit of its tensors is compared, by their SHA-256. A delta that is missing, repeated, out of order, damaged or
    of another run is refused.
    """
    from gr.checkpoint import resolve
    from gr.checkpoint.apply import apply_deltas

    with writes("out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
    last = apply_deltas(resolve(base), deltas, out)
    say(f"{out}: step {last.step}, every bit as published (SHA-256 {last.after[:16]})")

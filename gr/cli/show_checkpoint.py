"""`gr checkpoint`: what is in one."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from gr.cli.lazy import StrictGroup
from gr.cli.out import dump, say
from gr.units import size

if TYPE_CHECKING:
    from gr.checkpoint.contents import Contents, SavedTensor


@click.group(cls=StrictGroup)
def command() -> None:
    """Look at checkpoints."""


@command.command()
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print every tensor, as JSON.")
def show(checkpoint: str, as_json: bool) -> None:
    """Say what is in CHECKPOINT (a run folder's best, or else its latest, or one of it): tables, states, bytes.

    Nothing but its metadata is read.
    """
    from dataclasses import asdict

    from gr.checkpoint import resolve
    from gr.checkpoint.contents import read_contents

    contents = read_contents(resolve(checkpoint))
    if as_json:
        dump(json.dumps(asdict(contents), indent=2))
    else:
        say(*describe(contents))


def describe(contents: "Contents") -> list[str]:
    """A line for the whole, one for each table with its states, and the dense part."""
    by = "" if contents.ranks is None else f", saved by {contents.ranks} rank(s)"
    of_tables = (tensor for tensors in contents.tables.values() for tensor in tensors.values())
    place = ", ".join(f"{name} {value}" for name, value in contents.data.items() if value is not None)
    lines = [
        f"{contents.path}: step {contents.step}{by}",
        f"data        {place or 'not begun'}",
        f"files       {len(contents.files)}, {size(sum(contents.files.values()))}",
        f"tables      {len(contents.tables)}, {_bytes(of_tables)}",
    ]
    for name, tensors in contents.tables.items():
        shown = (f"{kind} {'x'.join(map(str, t.shape))} {t.dtype} {size(t.bytes)}" for kind, t in tensors.items())
        lines.append(f"  {name}: {', '.join(shown)}")
    states = f", optimizer {_bytes(contents.dense_optimizer.values())}" if contents.dense_optimizer else ""
    lines.append(f"dense       {len(contents.dense)} parameters, {_bytes(contents.dense.values())}{states}")
    return lines


def _bytes(tensors: Iterable["SavedTensor"]) -> str:
    return size(sum(tensor.bytes for tensor in tensors))

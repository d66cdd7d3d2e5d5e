"""`gr config`: look at configurations without running anything. Imports no torch."""

import json

import click

from gr.cli.out import dump, say
from gr.config import differences, dump_config, json_schema, load_config

_path = click.argument("config")
_overrides = click.argument("overrides", nargs=-1, metavar="[a.b.c=value]...")


@click.group()
def command() -> None:
    """Show, check or compare configurations."""


@command.command()
@_path
@_overrides
def show(config: str, overrides: tuple[str, ...]) -> None:
    """Print CONFIG with its bases, the overrides and every default resolved."""
    dump(dump_config(load_config(config, overrides)))


@command.command()
@_path
@_overrides
def check(config: str, overrides: tuple[str, ...]) -> None:
    """Say whether CONFIG with the overrides is valid, and every fault when it is not."""
    load_config(config, overrides)
    say(f"ok: {config}")


@command.command()
@click.argument("left")
@click.argument("right")
def diff(left: str, right: str) -> int:
    """Print the paths where two resolved configurations differ, with both values. Exit code 1 when any does."""
    changes = differences(load_config(left), load_config(right))
    for path, (before, after) in changes.items():
        say(f"{path}: {before} -> {after}")
    return 1 if changes else 0


@command.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file, for editors that complete and check YAML."""
    dump(json.dumps(json_schema(), indent=2))

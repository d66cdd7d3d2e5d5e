"""`gr config`: look at configurations without running anything. Imports no torch."""

import json
from collections.abc import Iterator
from typing import Any

import click
from pydantic import BaseModel

from gr.config import dump_config, json_schema, load_config

_path = click.argument("config", type=click.Path())
_overrides = click.argument("overrides", nargs=-1, metavar="[a.b.c=value]...")
_ABSENT = object()


@click.group()
def command() -> None:
    """Show, check or compare configurations."""


@command.command()
@_path
@_overrides
def show(config: str, overrides: tuple[str, ...]) -> None:
    """Print CONFIG with its bases, the overrides and every default resolved."""
    click.echo(dump_config(load_config(config, overrides)), nl=False)


@command.command()
@_path
@_overrides
def check(config: str, overrides: tuple[str, ...]) -> None:
    """Say whether CONFIG with the overrides is valid, and every fault when it is not."""
    load_config(config, overrides)
    click.echo(f"ok: {config}")


@command.command()
@click.argument("left", type=click.Path())
@click.argument("right", type=click.Path())
def diff(left: str, right: str) -> int:
    """Print the paths where two resolved configurations differ, with both values. Exit code 1 when any does."""
    a, b = (dict(_leaves(load_config(path))) for path in (left, right))
    differing = [path for path in {**a, **b} if a.get(path, _ABSENT) != b.get(path, _ABSENT)]
    for path in differing:
        click.echo(f"{path}: {_shown(a.get(path, _ABSENT))} -> {_shown(b.get(path, _ABSENT))}")
    return 1 if differing else 0


@command.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file, for editors that complete and check YAML."""
    click.echo(json.dumps(json_schema(), indent=2))


def _leaves(section: BaseModel | dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items() if isinstance(section, dict) else section:
        if isinstance(value, BaseModel | dict) and value != {}:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value)

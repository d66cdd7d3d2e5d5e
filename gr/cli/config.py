"""`gr config`: look at configurations without running anything. Imports no torch."""

import json
from itertools import zip_longest

import click

from gr.cli.lazy import StrictGroup
from gr.cli.out import dump, say
from gr.config import differences, dump_config, json_schema, load_config, packaged
from gr.config.explain import Keys, Meaning

_path = click.argument("config")
_overrides = click.argument("overrides", nargs=-1, metavar="[a.b.c=value]...")


@click.group(cls=StrictGroup)
def command() -> None:
    """List, show, check, compare or explain configurations."""


@command.command(name="list")
def list_() -> None:
    """List the configurations that are installed with gr; every command that takes a file takes their names."""
    formatter = click.HelpFormatter()
    formatter.write_dl([(name, packaged.title(name)) for name in packaged.names()])
    dump(formatter.getvalue())


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
@click.argument("key", required=False)
def explain(key: str | None) -> None:
    """Say what KEY means, such as trainer.precision: type, default and allowed values; of a section, its keys.

    Without KEY, the keys of the top level.
    """
    keys, formatter = Keys(), click.HelpFormatter()
    if key is None:
        formatter.write_dl([(name, keys.explain(name)[0].description) for name in keys.top])
    meanings = keys.explain(key) if key else []
    for meaning, following in zip_longest(meanings, meanings[1:]):
        where = f" ({meaning.where})" if meaning.where else ""
        formatter.write_text(f"{key}{where}: {meaning.description}")
        with formatter.indentation():
            formatter.write_dl([("type", meaning.type), ("default", meaning.default or "none: it has to be set")])
            if meaning.keys and (following is None or following.keys != meaning.keys):
                formatter.write_text("keys:")
                with formatter.indentation():
                    formatter.write_dl([_line(each) for each in meaning.keys])
    dump(formatter.getvalue())


def _line(key: Meaning) -> tuple[str, str]:
    if key.key == "kind":
        return key.key, f"{key.type}: {key.description}"
    default = "to be set" if key.default is None else f"default {key.default}"
    return key.key, f"{f'({key.where}) ' if key.where else ''}{key.type}, {default}. {key.description}"


@command.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file, for editors that complete and check YAML."""
    dump(json.dumps(json_schema(), indent=2))

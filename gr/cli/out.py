"""What a command prints, and the file that it writes."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gr.errors import ConfigError, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


def say(*lines: str, err: bool = False) -> None:
    """Prints lines on stdout or stderr; control characters and line breaks inside a line are shown as escapes.

    Everything that gr prints goes through here or `show`, but for `dump`.
    """
    for line in lines:
        click.echo(printable(line), err=err)


def dump(text: str) -> None:
    """Prints a document on stdout as it is: YAML or JSON, which have escapes of their own."""
    click.echo(text, nl=not text.endswith("\n"))


def cell(text: str) -> "Text":
    """A title, a heading or a cell of a table: without Rich's markup, with control characters escaped."""
    from rich.text import Text

    return Text(printable(text))


def show(table: "RenderableType", width: int = 0) -> None:
    """Prints a table, made of `cell`s where its text is not ours. width: columns that it needs."""
    from rich.console import Console

    Console(width=max(Console().width, width) if width else None).print(table)


def check_out(out: Path, force: bool) -> None:
    """Raises ConfigError where the file of --out is there already, or cannot be."""
    if out.exists() and not force:
        raise ConfigError(f"--out={out} exists: name another file, or replace it with --force")
    if not out.parent.is_dir():
        raise ConfigError(f"--out={out}: there is no folder {out.parent}; make it first")

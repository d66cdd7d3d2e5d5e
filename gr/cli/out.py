"""The output of commands: lines, tables, and the files of --out and --picture."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from gr.errors import ConfigError, InstallError, printable
from gr.files import is_transient

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_PICTURES = (".png", ".pdf", ".svg")


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


def check_out(out: Path, force: bool, kind: Literal["file", "folder"] = "file") -> None:
    """Raises ConfigError where --out is there already, is of another kind (or a device, say), or cannot be."""
    if out.exists() and not force:
        raise ConfigError(f"--out={out} exists: name another {kind}, or replace it with --force")
    if out.exists() and not (out.is_file() if kind == "file" else out.is_dir()):
        raise ConfigError(f"--out={out} is no {kind}, so --force does not replace it: name another {kind}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out={out}: there is no folder {out.parent}; make it first")


@contextmanager
def writes(option: str, out: Path, *faults: type[Exception]) -> Iterator[None]:
    """Turns a failure to write the file or folder of an option into a ConfigError, but for one that may pass.

    faults: what the library that writes raises in place of OSError.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *faults)
    try:
        yield
    except kinds as error:
        if is_transient(error):
            raise
        why = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise ConfigError(f"--{option}={out}: cannot be written: {why}; make room, or name another") from error


def check_picture(out: Path) -> None:
    """Raises ConfigError where the file of --picture cannot be written, InstallError where nothing can draw it."""
    if not out.parent.is_dir():
        raise ConfigError(f"--picture={out}: there is no folder {out.parent}; make it first")
    if out.suffix not in _PICTURES:
        raise ConfigError(f"--picture={out}: name a file that ends in {' or '.join(_PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InstallError("--picture needs matplotlib: install it with `pip install 'gr[plot]'`")

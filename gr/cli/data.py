"""`gr data`: what is in a data folder, and what is wrong with it."""

import textwrap
from itertools import accumulate
from pathlib import Path

import click

from gr.cli.lazy import StrictGroup
from gr.cli.out import check_picture, say, writes
from gr.errors import ConfigError

_LINES, _COLUMNS = 24, 80


@click.group(cls=StrictGroup)
def command() -> None:
    """Look at data folders."""


@command.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Every column and fault, though they fill more than a screen.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="Draw history lengths, popularity of items and events over time as this .png, .pdf or .svg.",
)
def check(folder: Path, everything: bool, picture: Path | None) -> int:
    """Say what is in FOLDER and what is wrong with it, from all of its rows.

    Exit code 2 where something is wrong: every kind of fault is counted, with the first row that has it.
    """
    from gr import logging
    from gr.data.check import check_folder, is_tabular

    logging.configure()
    if picture is not None:
        check_picture(picture)
        if is_tabular(folder):
            raise ConfigError("--picture draws user histories, and this folder is tabular: leave it out")
    result = check_folder(folder)
    lines = screen(result.title, result.facts, result.faults.lines, None if everything else _LINES)
    say(*lines)
    if picture is not None:
        from gr.data.picture import draw

        with writes("picture", picture):
            draw(result, picture)
    return 2 if result.faults.by_kind else 0


def screen(title: str, facts: list[tuple[str, str]], faults: list[str], limit: int | None) -> list[str]:
    """Lines of 80 columns, at most `limit`: where there are more, it says how many facts and faults are left out."""
    width = max(len(name) for name, _ in facts)
    blocks = [_wrapped(f"{name:{width}}  {text}", " " * (width + 2)) for name, text in facts]
    wrong = [_wrapped(f"! {fault}", "  ") for fault in faults]
    heading = f"faults: {len(faults)} kinds" if faults else "faults: none"
    if limit is not None:
        room = limit - 2
        shown = _first(wrong, max(room // 2, room - sum(map(len, blocks))), "kinds of faults")
        blocks, wrong = _first(blocks, room - sum(map(len, shown)), "columns"), shown
    return [title, *(line for block in blocks for line in block), heading, *(line for block in wrong for line in block)]


def _first(blocks: list[list[str]], room: int, noun: str) -> list[list[str]]:
    """The blocks that fit so many lines, and a line that counts the others."""
    if sum(map(len, blocks)) <= room:
        return blocks
    ends = list(accumulate(map(len, blocks)))
    fitting = sum(end < room for end in ends)
    return [*blocks[:fitting], [f"and {len(blocks) - fitting} more {noun}: see them with --all"]]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent=indent)

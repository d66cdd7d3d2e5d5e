"""The options that commands on a checkpoint share: the checkpoint, values of its configuration, the file to write."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from gr.cli.lazy import end_as_by_ctrl_c
from gr.cli.out import check_out
from gr.environment import whole_number

Function = Callable[..., None]


def on_checkpoint(function: Function) -> Function:
    """A command that is called with checkpoint, overrides, plugins and rank, and whose log is set up.

    The checkpoint is that of --checkpoint, or else the first argument; the others are overrides.
    """

    @click.option(
        "--checkpoint", help="CHECKPOINT as an option: run folder (its best, or else its latest) or one of it."
    )
    @click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="Allow this plugin of the checkpoint.")
    @click.argument("arguments", nargs=-1, metavar="CHECKPOINT [KEY.PATH=VALUE]...")
    @functools.wraps(function)
    def command(checkpoint: str | None, arguments: tuple[str, ...], **options: Any) -> None:
        from gr import logging

        if checkpoint is None:
            if not arguments:
                raise click.UsageError("which checkpoint? Name a run folder or a step-XXXXXXXX folder of one")
            checkpoint, *rest = arguments
            arguments = tuple(rest)
        rank = whole_number("RANK", 0)
        logging.configure(rank)
        function(checkpoint=checkpoint, overrides=arguments, rank=rank, **options)

    return command


def writing(what: Literal["file", "folder"]) -> Callable[[Function], Function]:
    """A command with an option --out, which is not there yet unless --force is set."""

    def decorate(function: Function) -> Function:
        @click.option("--out", required=True, type=click.Path(path_type=Path), help=f"{what.capitalize()} to write.")
        @click.option("--force", is_flag=True, help="Replace what is there.")
        @functools.wraps(function)
        def command(out: Path, force: bool, **options: Any) -> None:
            check_out(out, force, what)
            end_as_by_ctrl_c()
            function(out=out, **options)

        return command

    return decorate

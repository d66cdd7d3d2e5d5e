"""The checkpoint that a command works on."""

import click


def checkpoint_and_overrides(checkpoint: str | None, arguments: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The checkpoint of --checkpoint, or else of the first argument, and the overrides after it."""
    if checkpoint is not None:
        return checkpoint, arguments
    if not arguments:
        raise click.UsageError("which checkpoint? Name a run folder or a step-XXXXXXXX folder of one")
    return arguments[0], arguments[1:]

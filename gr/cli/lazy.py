"""Groups of commands: strict on options; and one that imports a command when it runs, for `gr --help` without torch."""

import difflib
import importlib
import math
import signal
from collections import Counter
from collections.abc import Mapping
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A range of numbers. click takes nan for a number in it, as nan is not below its least."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is no finite number.", param, ctx)
        return number


def end_as_by_ctrl_c() -> None:
    """Makes SIGTERM, and SIGHUP of a terminal that closes, end the command as Ctrl-C does: what is half written goes.

    A SIGHUP that nohup ignores stays ignored.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


class StrictGroup(click.Group):
    """An option of one value that is given twice is an error, of which click would take the last without a word; and so
    is an empty word, as a variable of the shell that is not set makes it: as a path it would be the working folder.
    """

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name, command, rest = super().resolve_command(ctx, args)
        if any("\0" in argument for argument in rest):
            ctx.fail("an argument has a NUL in it")
        if command is not None and not isinstance(command, click.Group):
            trial = click.Context(command, info_name=name, parent=ctx, resilient_parsing=True)
            values, _, order = command.make_parser(trial).parse_args(list(rest))
            if empty := [option for option in order if "" in _listed(values.get(option.name or ""))]:
                ctx.fail(
                    f"{empty[0].get_error_hint(ctx)} is empty: write a value, or leave it out; . is the working folder"
                )
            single = Counter(
                option.opts[0] for option in order if isinstance(option, click.Option) and not option.multiple
            )
            if twice := [option for option, count in single.items() if count > 1]:
                ctx.fail(f"{twice[0]} is given {single[twice[0]]} times, and takes one value")
        return name, command, rest


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class LazyGroup(StrictGroup):
    """lazy: name of the subcommand -> ("module:attribute", its line in the help)."""

    def __init__(self, *args, lazy: Mapping[str, tuple[str, str]], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if name not in self._lazy and not name.startswith("-"):
            near = difflib.get_close_matches(name, self._lazy, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(self._lazy)}"
            ctx.fail(f"no such command '{name}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._lazy.items()])

"""`gr plan`: does a model fit, how fast is a step, on how many ranks. Allocates nothing and needs no GPU."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from gr.api import planning_problem
from gr.cli.out import cell, say, show, writes
from gr.cli.plan_serving import DOES_NOT_FIT, plan_package, plan_serving
from gr.config.inventory import InventoryConfig
from gr.errors import ConfigError
from gr.planner.topology import Topology
from gr.units import duration, size

MOVES_SHOWN = 20


@click.command(
    help="Plan where the tables of CONFIG go, on ranks of a named machine, and predict memory and step time.\n\n"
    "CONFIG is an experiment, an inventory (configs/scale) or a list of tables (.json, .parquet). "
    "With --serve the ranks are cards that serve the model. Exit code 0: it fits, 3: it does not.\n\n"
    "Where CONFIG is the folder of a package, prints what each of its cards holds."
)
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--topology", metavar="NAMExRANKS|FILE.yaml", help="h100x64, or a file of `gr calibrate`.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the plan, for `gr train --plan`.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a page with pictures.")
@click.option("--smallest", is_flag=True, help="Find the least number of ranks that fits, and what limits it.")
@click.option("--serve", metavar="DTYPE", help="Plan for serving: tables of fp32, fp16, int8, int4 or int2.")
@click.option("--examples", type=click.IntRange(1, 2**20), help="Examples of a batch that is served; 64 unless set.")
@click.option(
    "--diff", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json", help="What changes from plan A to B."
)
def command(
    config: str | None,
    overrides: tuple[str, ...],
    topology: str | None,
    json_path: Path | None,
    html_path: Path | None,
    smallest: bool,
    diff: tuple[Path, Path] | None,
    **serving: Any,
) -> int:
    if diff is not None:
        if config or topology or json_path or html_path or smallest or any(serving.values()):
            raise ConfigError("--diff takes two plan files and nothing else: gr plan --diff a.json b.json")
        _diff(*diff)
        return 0
    if config is None:
        raise ConfigError("CONFIG is missing: name an experiment, an inventory or a list of tables, or use --diff")
    if Path(config).is_dir():
        if overrides or topology or json_path or html_path or smallest or any(serving.values()):
            raise ConfigError(f"{config} is a folder, as a package is, whose cards are what they are: gr plan {config}")
        plan_package(Path(config))
        return 0
    if smallest and (json_path or html_path):
        raise ConfigError("--smallest writes no file: leave out --json and --html, then plan for the ranks it finds")
    if json_path is not None and html_path is not None and json_path.resolve() == html_path.resolve():
        raise ConfigError(f"--json and --html are both {json_path}: name two files")
    problem = planning_problem(config, overrides, topology)
    if any(serving.values()):
        if json_path or html_path:
            raise ConfigError("--serve prints its plan: leave out --json and --html")
        return plan_serving(*problem[:2], **serving, smallest=smallest)
    if smallest:
        return _smallest(*problem)
    for path in (json_path, html_path):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: {path.parent} is no folder; make it, or name another file")
    return _plan(*problem, {"json": json_path, "html": html_path})


def _plan(inventory: InventoryConfig, topology: Topology, divides: int, files: dict[str, Path | None]) -> int:
    from gr.planner.estimate import estimate
    from gr.planner.plan import DoesNotFit, search
    from gr.planner.remedies import explanation, nearest
    from gr.planner.report import summary

    try:
        with _working("planning"):
            estimated = estimate(search(inventory, topology))
    except DoesNotFit as error:
        with _working("it does not fit; trying remedies"):
            if any(files.values()):
                _write(estimate(nearest(inventory, topology)), files)
            text = explanation(inventory, topology, error, divides)
        say(*f"error: {text}".split("\n"), err=True)
        return DOES_NOT_FIT
    _write(estimated, files)  # before a reader of the report may close its end of a pipe
    for part in summary(estimated):
        show(part)
    return 0 if estimated.fits else DOES_NOT_FIT


def _smallest(inventory: InventoryConfig, topology: Topology, divides: int) -> int:
    from gr.planner.dense_strategies import strategy_words
    from gr.planner.smallest import smallest, smallest_by_strategy

    with _working("trying numbers of ranks"):
        least = smallest(inventory, topology, divides)
        by_strategy = smallest_by_strategy(inventory, topology, divides)
    table = Table(Column("ranks", justify="right"), "fits", "why", title=cell(f"{inventory.name} on {topology.name}"))
    for trial in least.trials:
        table.add_row(f"{trial.ranks:,}", "yes" if trial.fits else "no", cell(trial.limit))
    show(table)
    if by_strategy:
        table = Table("strategy", "layers", Column("smallest", justify="right"), title="by strategy of the dense part")
        for strategy, ranks in by_strategy:
            table.add_row(*strategy_words(strategy), "none" if ranks is None else f"{ranks:,} ranks")
        show(table)
    if least.ranks is None:
        say(f"error: {least.reason}", err=True)
        return DOES_NOT_FIT
    say(
        "; ".join(
            filter(None, (f"smallest: {least.ranks} rank{'s' * (least.ranks > 1)} of {topology.name}", least.reason))
        )
    )
    return 0


def _diff(before: Path, after: Path) -> None:
    from gr.planner.compare import compare
    from gr.planner.planfile import load_plan

    comparison = compare(load_plan(before), load_plan(after))
    for what, old, new in comparison.others:
        say(f"the plans are for another {what}: {old} before, {new} after")
    columns = ("table", "before", "after", Column("moved", justify="right"))
    table = Table(*columns, title=cell(f"from {before} to {after}"))
    changes = sorted(comparison.changes, key=lambda change: -change.moved_bytes)
    for change in changes[:MOVES_SHOWN]:
        row = [_placed(placement) for placement in (change.before, change.after)]
        table.add_row(cell(change.table), *row, size(change.moved_bytes))
    if changes:
        show(table)
    if len(changes) > MOVES_SHOWN:
        say(f"and {len(changes) - MOVES_SHOWN} tables more")
    step, hbm = comparison.step_seconds, comparison.hbm_bytes
    counted = _counted(comparison.new, comparison.gone, comparison.moved)
    say(f"{counted}; {size(comparison.moved_bytes)} move to another rank")
    say(f"step: {duration(step[0])} -> {duration(step[1])} ({step[1] / step[0] - 1:+.1%})")
    say(f"fullest rank: {size(hbm[0])} -> {size(hbm[1])}")


def _counted(new: int, gone: int, moved: int) -> str:
    """A phrase like '2 tables are new, 1 is gone, 3 change place'; a count of 0 is left out unless all are."""
    counts = [(new, "is new", "are new"), (gone, "is gone", "are gone"), (moved, "changes place", "change place")]
    counts = [count for count in counts if count[0]] or counts[2:]
    parts = [f"{count} {one if count == 1 else many}" for count, one, many in counts]
    parts[0] = parts[0].replace(" ", " table " if counts[0][0] == 1 else " tables ", 1)
    return ", ".join(parts)


def _placed(placement) -> str:
    if placement is None:
        return "(none)"
    ranks = placement.ranks
    where = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks from {min(ranks)}"
    return f"{placement.shown_type}, {where}"


def _write(estimated, files: dict[str, Path | None]) -> None:
    from gr.planner.estimate import predicted
    from gr.planner.planfile import dump_plan
    from gr.planner.report import page

    texts = {"json": lambda: dump_plan(estimated.plan, predicted(estimated)), "html": lambda: page(estimated)}
    paths = {kind: path for kind, path in files.items() if path is not None}
    for kind, path in paths.items():
        with writes(kind, path):
            path.write_text(texts[kind]())
    note = "" if estimated.fits else ": the plan that comes closest, which does not fit"
    say(*(f"wrote {path}{note}" for path in paths.values()))


def _working(what: str) -> Progress:
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn(what), TimeElapsedColumn()
    progress = Progress(*columns, transient=True, console=console, disable=not console.is_terminal)
    progress.add_task(what)
    return progress

"""`gr scale`: a grid of runs, and the scaling laws that fit them. Imports no torch before a cell runs."""

from pathlib import Path

import click

from gr.cli.lazy import StrictGroup
from gr.cli.out import check_picture, say, writes
from gr.environment import whole_number
from gr.errors import ConfigError, DataError
from gr.files import read_json


class _RunByDefault(StrictGroup):
    """`gr scale GRID` is `gr scale run GRID`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if known or not args else ["run", *args])


@click.group(cls=_RunByDefault)
def command() -> None:
    """Run a grid of towers, widths, FLOPs and seeds: `gr scale GRID`. Fit scaling laws to it: `gr scale fit OUT`."""


@command.command()
@click.argument("grid")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--shard", metavar="I/N", default="0/1", help="The cells I, I + N, I + 2 N, ...: one of N hosts.")
@click.option("--plan", is_flag=True, help="Only list the cells.")
def run(grid: str, overrides: tuple[str, ...], shard: str, plan: bool) -> None:
    """Train the cells of GRID, cheapest first; what is finished is skipped, what was interrupted goes on."""
    from gr.scaling.grid import load_grid, run_cell, share

    if (ranks := whole_number("WORLD_SIZE", 1)) != 1:
        raise ConfigError(f"gr scale runs a cell in one process, and this is one of {ranks} ranks: start it without "
                          "torchrun, with --shard I/N on each of N hosts or devices")  # fmt: skip
    first, _, shards = shard.partition("/")
    if not (first.isdecimal() and shards.isdecimal() and int(first) < int(shards)):
        raise ConfigError(f"--shard={shard}: expected I/N with I from 0 to N - 1, as 0/4")
    loaded = load_grid(grid, overrides)
    todo = list(share(loaded, int(first), int(shards)))
    flops = sum(cell.flops for cell, _ in todo)
    say(f"{grid}: {len(loaded.cells)} cells, {len(todo)} to run here, {flops:.2e} FLOPs")
    say(*(f"left out: {count} of {reason}" for reason, count in loaded.left_out.items()))
    if plan:
        say(*(f"  {c.name}: {c.steps} steps, {c.parameters} + {c.table_parameters} parameters" for c, _ in todo))
        return
    from gr import logging

    logging.configure()
    for number, (cell, config) in enumerate(todo, start=1):
        say(f"{number} of {len(todo)}: {cell.name}, {cell.steps} steps", err=True)
        if not run_cell(cell, config):
            return


@command.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--oracle", type=click.Path(path_type=Path), help="oracle.json of the data: its loss is E.")
@click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True, help="Of the bootstrap.")
@click.option("--min-steps", type=click.IntRange(1), default=1, help="Leave out finished cells of fewer steps.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw it as this .png, .pdf or .svg.")
def fit(out: Path, oracle: Path | None, resamples: int, min_steps: int, picture: Path | None) -> None:
    """Fit the finished cells of OUT, tower by tower; writes cells.parquet, cells.csv and fit.json there."""
    if picture is not None:
        check_picture(picture)
    from gr.scaling.fit import Cells, fit_tower
    from gr.scaling.grid import finished
    from gr.scaling.report import draw, lines, write

    every, floor = finished(out), None if oracle is None else _floor(oracle)
    rows = [row for row in every if row["steps"] >= min_steps]
    if len(rows) < len(every):
        say(f"left out: {len(every) - len(rows)} of fewer than {min_steps} steps")
    towers = {row["tower"]: [each for each in rows if each["tower"] == row["tower"]] for row in rows}
    fits = [fit_tower(name, Cells.of(own), floor, resamples) for name, own in towers.items()]
    write(out, rows, fits, floor)
    for each in fits:
        say(*lines(each))
    seconds = sum(row.get("cpu_seconds", 0.0) for row in rows)
    say(f"{len(rows)} cells, {seconds / 3600:.2f} CPU-hours; {out}/cells.parquet, cells.csv, fit.json")
    if picture is not None:
        with writes("picture", picture):
            draw(fits, floor, picture)


def _floor(path: Path) -> float:
    remedy = "name the oracle.json of a synthetic stream"
    loss = read_json(path, DataError, remedy).get("loss")
    if not isinstance(loss, int | float):
        raise DataError(f"--oracle={path}: its loss is {loss!r}: {remedy}")
    return float(loss)

"""A grid of towers, widths, lengths, FLOPs and seeds, and its cells: runs of `gr train`. No torch before one runs."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from gr.config import RetrievalConfig, load_config
from gr.config.base import Count, PositiveFloat, Section
from gr.config.load import load_section
from gr.errors import ConfigError, DataError
from gr.files import read_json, write_json
from gr.planner.estimate_dense import dense_work, sequence_flops

CELL, REPORT = "cell.json", "report.json"


class TowerGrid(Section):
    """One line of the law: a tower whose sizes follow the width."""

    set: tuple[str, ...] = Field((), description="KEY=VALUE of the experiment, as `gr train` takes them.")
    times_width: dict[str, PositiveFloat] = Field({}, description="Keys of the experiment set to a multiple of width.")
    over_width: dict[str, PositiveFloat] = Field({}, description="Keys set to a number divided by the width.")


class GridConfig(Section):
    """A grid: every tower at every width and length, for every budget and seed."""

    experiment: str = Field(description="The configuration that each cell starts from: a file, or an installed name.")
    out: str = Field(description="Folder of the cells, each a run_dir.")
    towers: dict[str, TowerGrid] = Field(min_length=1, description="Towers by the names that tables show.")
    widths: tuple[Count, ...] = Field(min_length=1, description="model.dim.")
    lengths: tuple[Count, ...] = Field(min_length=1, description="data.max_length: tokens of an example.")
    budgets: tuple[PositiveFloat, ...] = Field(min_length=1, description="FLOPs of a run, forward and backward.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((1,), min_length=1, description="seed: a run for each.")
    min_steps: Count = Field(100, description="Cells of fewer steps are left out: they measure the warm-up.")


@dataclass(frozen=True)
class Cell:
    """A run of the grid. parameters: N, of the dense part. table_parameters: of the tables, beside it. tokens: D.

    flops: forward and backward of the dense part and the loss, by the towers' cost(), of `steps` whole steps: the
    budget but for rounding.
    """

    tower: str
    width: int
    length: int
    budget: float
    seed: int
    steps: int
    parameters: int
    table_parameters: int
    tokens: int
    flops: float

    @property
    def name(self) -> str:
        return f"{self.tower}-w{self.width}-n{self.length}-c{self.budget:g}-s{self.seed}"


@dataclass(frozen=True)
class Grid:
    """The cells that run, cheapest first, with their configurations; and how many do not, by the reason."""

    out: Path
    cells: tuple[tuple[Cell, RetrievalConfig], ...]
    left_out: dict[str, int]


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Raises ConfigError for a grid without cells, or an experiment whose loss is not measured."""
    grid = load_section(GridConfig, path, overrides)
    chosen: list[tuple[Cell, RetrievalConfig]] = []
    left_out: dict[str, int] = {}
    for tower, width, length in product(grid.towers, grid.widths, grid.lengths):
        config = _experiment(grid, tower, width, length)
        one, available = _one_step(config, tower)
        for budget, seed in product(grid.budgets, grid.seeds):
            steps = round(budget / one.flops)
            if steps < grid.min_steps or steps > available:
                few = steps < grid.min_steps
                reason = f"fewer than {grid.min_steps} steps" if few else f"more than one pass of {config.data.path}"
                left_out[reason] = left_out.get(reason, 0) + 1
                continue
            sums = {"tokens": one.tokens * steps, "flops": one.flops * steps}
            cell = Cell(**asdict(one) | {"budget": budget, "seed": seed, "steps": steps} | sums)
            chosen.append((cell, _of_cell(config, cell, Path(grid.out))))
    if not chosen:
        reasons = ", ".join(f"{count} have {reason}" for reason, count in left_out.items())
        raise ConfigError(
            f"{path}: no cell is left to run: {reasons}; set other budgets or widths, or prepare more data"
        )
    chosen.sort(key=lambda pair: (pair[0].budget, pair[0].seed))
    return Grid(Path(grid.out), tuple(chosen), left_out)


def _experiment(grid: GridConfig, tower: str, width: int, length: int) -> RetrievalConfig:
    line = grid.towers[tower]
    sizes = {key: str(max(1, round(factor * width))) for key, factor in line.times_width.items()}
    shares = {key: repr(number / width) for key, number in line.over_width.items()}
    keys = {"model.dim": str(width), "data.max_length": str(length), "trainer.steps": "1", "trainer.epochs": "null"}
    overrides = [*line.set, *(f"{key}={value}" for key, value in {**keys, **sizes, **shares}.items())]
    config = load_config(grid.experiment, overrides)
    if not isinstance(config, RetrievalConfig) or not config.evaluation.loss:
        raise ConfigError(
            f"experiment={grid.experiment}: a grid compares the loss on held-out users: set task.kind=retrieval with "
            "evaluation.loss=true there"
        )
    return config


def _one_step(config: RetrievalConfig, tower: str) -> tuple[Cell, int]:
    """The sizes of one step, and the steps of one pass. Raises ConfigError where examples do not fill the window."""
    schema, length, batch = config.load_schema(), config.data.max_length, config.trainer.global_batch_size
    longest = schema.events / max(schema.users, 1) - config.data.train_holdout - 1
    if longest < length:
        raise ConfigError(
            f"lengths={length}, but {config.data.path} has {longest:.1f} events to read a user, and FLOPs are those of "
            f"full windows: set lengths to {max(1, int(longest))} or less"
        )
    inventory = config.inventory(schema)
    work = dense_work(inventory, batch)
    one = Cell(
        tower=tower,
        width=config.model.dim,
        length=length,
        budget=0.0,
        seed=0,
        steps=1,
        parameters=work.parameters,
        table_parameters=sum(table.rows * config.model.dim for table in inventory.tables),
        tokens=batch * length,
        flops=batch * float(sequence_flops(inventory, np.array([length]))[0]),
    )
    return one, schema.users // batch


def _of_cell(config: RetrievalConfig, cell: Cell, out: Path) -> RetrievalConfig:
    trainer = config.trainer.model_copy(update={"steps": cell.steps})
    return config.model_copy(update={"seed": cell.seed, "trainer": trainer, "run_dir": str(out / cell.name)})


def share(grid: Grid, shard: int, shards: int) -> Iterator[tuple[Cell, RetrievalConfig]]:
    """The unfinished cells of one of several hosts. Raises ConfigError for a folder of another grid's cell."""
    for cell, config in grid.cells[shard::shards]:
        folder = Path(config.run_dir)
        if (folder / CELL).is_file():
            _check_same(cell, folder)
        if not (folder / REPORT).is_file():
            yield cell, config


def run_cell(cell: Cell, config: RetrievalConfig) -> bool:
    """Trains a cell, from where it was interrupted; False where a signal stopped it. Writes cell.json: the Cell, and
    the CPU-seconds of the process that finished it.
    """
    from gr.api import train

    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CELL, asdict(cell))
    started = time.process_time()
    if train(config) is None:
        return False
    write_json(folder / CELL, asdict(cell) | {"cpu_seconds": time.process_time() - started})
    return True


def _check_same(cell: Cell, folder: Path) -> None:
    saved = _read(folder / CELL)
    for key, value in asdict(cell).items():
        if saved.get(key) != value:
            raise ConfigError(f"{folder} has {key}={saved.get(key)}, the grid {value}: set another out, or remove it")


def finished(out: Path) -> list[dict[str, Any]]:
    """The finished cells of a folder: the fields of Cell, cpu_seconds, and the metrics of the report.

    Raises DataError where there is none, or a file that is none of ours.
    """
    rows = []
    for path in sorted(out.glob(f"*/{CELL}")):
        if (path.parent / REPORT).is_file():
            metrics = _read(path.parent / REPORT).get("model", {})
            if not isinstance(metrics.get("loss"), float):
                raise DataError(f"{path.parent / REPORT}: has no loss: run the cell again with evaluation.loss=true")
            rows.append({"cell": path.parent.name, **_read(path), **metrics})
    if not rows:
        raise DataError(f"{out}: holds no finished cell of `gr scale GRID`: name the grid's folder `out`")
    return rows


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, DataError, "remove its folder and run the cell again")

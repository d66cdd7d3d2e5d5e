"""The report on a plan for the terminal: one screen of 80 columns."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gr.errors import printable
from gr.planner.dense_collectives import DENSE_COLLECTIVES
from gr.planner.dense_strategies import compare_strategies, strategy_words
from gr.planner.estimate import MEMORY, PHASES, Estimate, TableShare
from gr.planner.report.figures import headline, imbalance, straggler, verdict, words, world
from gr.units import duration, percent, size

TOP = 10
# TorchRec's abbreviations.
ABBREVIATIONS = {
    "data_parallel": "DP",
    "table_wise": "TW",
    "column_wise": "CW",
    "row_wise": "RW",
    "table_row_wise": "TWRW",
    "table_column_wise": "TWCW",
    "grid_shard": "GRID",
}
NAME_WIDTH = 22


def summary(estimate: Estimate) -> list[RenderableType]:
    """Renderables: verdict and headline, memory, top tables. Phases, links and every table are on the page."""
    tables: list[RenderableType] = [Text(), _top(estimate), _types(estimate.tables)]
    return [
        *_head(estimate),
        _text(straggler(estimate).explanation()),
        Text(),
        _memory(estimate),
        *_strategies(estimate),
        *(tables if estimate.tables else []),
    ]


def _text(text: str, style: str = "") -> Text:
    """Names of tables and models are data: no markup of Rich's, and no control characters."""
    return Text(printable(text), style=style)


def _head(estimate: Estimate) -> list[RenderableType]:
    where = f"{estimate.plan.topology.name}: {world(estimate)}"
    title = _text(f"{estimate.plan.inventory.name} on {where}", style="bold")
    fits = _text(verdict(estimate), style="green" if estimate.fits else "bold red")
    grid = Table.grid(padding=(0, 2))
    for name, value, note in headline(estimate):
        grid.add_row(_text(name), _text(value, style="bold"), _text(note, style="dim"))
    return [title, fits, grid]


def _table(title: str, columns: Sequence[str], *, left: int = 1) -> Table:
    """A table without a frame. The first `left` columns are text, the others figures."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return table


def _memory(estimate: Estimate) -> Table:
    capacity = estimate.plan.topology.hbm_bytes
    columns = ("kind", "min", "mean", "max", "max used", "max / mean")
    table = _table(f"Memory per rank, of {size(capacity)} (1 GB = 1e9 bytes)", columns)
    for kind, bytes_R in zip(MEMORY, estimate.memory_MR, strict=True):
        table.add_row(words(kind), *_spread(bytes_R, capacity))
    table.add_row("all", *_spread(estimate.total_memory_R, capacity), style="bold")
    if estimate.host_R.any():
        host = estimate.plan.topology.host_bytes
        table.add_row(f"host memory, of {size(host)}", *_spread(estimate.host_R, host))
    return table


def _spread(bytes_R: np.ndarray, capacity: float) -> Iterable[str]:
    low, mean, high = float(bytes_R.min()), float(bytes_R.mean()), float(bytes_R.max())
    share = percent(high / capacity) if capacity else "no capacity"
    return size(low), size(mean), size(high), share, f"{imbalance(bytes_R):.2f}"


def _strategies(estimate: Estimate) -> list[RenderableType]:
    """The plan under each strategy of the dense part; nothing where the dense part is small."""
    columns = ("strategy", "layers", "fullest", "fits", "collectives", "sent", "hidden", "step")
    table = _table("Strategies of the dense part, a rank and step", columns, left=2)
    for row in compare_strategies(estimate):
        of_strategy = row.estimate
        seconds = of_strategy.seconds_PR[[PHASES.index(phase) for phase in DENSE_COLLECTIVES]].max(axis=1).sum()
        table.add_row(
            *strategy_words(row.inventory),
            size(float(of_strategy.total_memory_R.max())),
            "yes" if of_strategy.fits else "no",
            f"{row.collectives:,}",
            size(row.sent_bytes),
            percent(float(of_strategy.hidden_P.sum() / seconds)) if seconds else "",
            duration(of_strategy.step_seconds),
        )
    return [Text(), table] if table.row_count else []


def _top(estimate: Estimate) -> Table:
    shown = min(TOP, len(estimate.tables))
    title = f"The {shown} costliest and the {shown} largest of {len(estimate.tables):,} tables"
    table = _table(title, ("costliest", "type", "a shard", "", "largest", "type", "one copy"), left=2)
    for index in (0, 4):
        table.columns[index].max_width = NAME_WIDTH
        table.columns[index].overflow = "ellipsis"
    table.columns[4].justify = table.columns[5].justify = "left"
    by_seconds = sorted(estimate.tables, key=lambda share: -share.seconds)
    by_bytes = sorted(estimate.tables, key=lambda share: -share.bytes)
    for costly, large in list(zip(by_seconds, by_bytes, strict=True))[:shown]:
        table.add_row(
            _text(costly.name),
            ABBREVIATIONS[costly.sharding_type],
            duration(costly.seconds),
            "",
            _text(large.name),
            ABBREVIATIONS[large.sharding_type],
            size(large.bytes),
        )
    return table


def _types(tables: Iterable[TableShare]) -> Text:
    tables = list(tables)
    types = Counter(table.sharding_type for table in tables)
    kernels = Counter(table.kernel for table in tables)
    text = ", ".join(f"{ABBREVIATIONS[name]} {number:,}" for name, number in types.most_common())
    held = ", ".join(f"{name} {number:,}" for name, number in kernels.most_common())
    return _text(f"Sharding types: {text}; kernels: {held}")

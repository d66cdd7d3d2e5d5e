"""The report in the terminal: one screen, with the numbers of the estimate."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from gr.config.inventory import SHARDING_TYPES
from gr.planner.estimate import MEMORY, Estimate
from gr.planner.report import summary
from gr.planner.report.figures import words
from gr.planner.report.terminal import ABBREVIATIONS
from gr.units import duration, size
from tests.support.estimates import estimate_of


def printed(estimated: Estimate, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    for part in summary(estimated):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(("ranks", "tables"), [(1, 1), (8, 26), (1024, 1000)])
def test_one_screen(ranks: int, tables: int, width: int) -> None:
    lines = printed(replace(estimate_of(ranks, tables), host_R=np.full(ranks, 1e9)), width)
    assert len(lines) <= 46 and max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_every_kind_of_memory_has_its_row() -> None:
    estimated = estimate_of(1024, 1000)
    lines = printed(estimated)
    for kind, bytes_R in zip(MEMORY, estimated.memory_MR, strict=True):
        row = next(line for line in lines if line.startswith(f"{words(kind)}  "))
        assert row.split("  ")[-1].strip() == f"{bytes_R.max() / bytes_R.mean():.2f}"
        assert all(size(float(value)) in row for value in (bytes_R.min(), bytes_R.mean(), bytes_R.max()))
    assert duration(estimated.step_seconds) in next(line for line in lines if line.startswith("Step  "))


def test_tables_by_cost_and_by_bytes() -> None:
    estimated = estimate_of(8, 26)
    lines = printed(estimated)
    first = lines[next(index for index, line in enumerate(lines) if line.startswith("costliest")) + 2].split()
    assert first[0] == max(estimated.tables, key=lambda share: share.seconds).name
    assert first[4] == max(estimated.tables, key=lambda share: share.bytes).name
    assert set(ABBREVIATIONS) == set(SHARDING_TYPES)
    types = Counter(share.sharding_type for share in estimated.tables)
    shown = " ".join(lines[-2:])
    assert all(f"{ABBREVIATIONS[name]} {number}" in shown for name, number in types.items())


def test_host_memory_has_a_row_where_tables_are_offloaded() -> None:
    estimated = estimate_of(8, 26)
    assert not any(line.startswith("host memory") for line in printed(estimated))
    lines = printed(replace(estimated, host_R=np.full(8, 96e9)))
    row = next(line for line in lines if line.startswith("host memory, of 192 GB"))
    assert "50.0 %" in row


def test_names_are_not_markup() -> None:
    lines = printed(estimate_of(8, 5, names=("[red]item[/red]",)))
    assert any("[red]item[/red]" in line for line in lines)


def test_a_long_name_is_cut_with_a_mark() -> None:
    lines = printed(estimate_of(1, 1, names=("x" * 90,)), 80)
    assert max(map(len, lines)) <= 80 and any("…" in line for line in lines)

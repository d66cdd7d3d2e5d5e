"""The picture of a benchmark with series: rate against length beside the roofline, time against batch, memory."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.case import Case
from benchmarks.machine import Peaks
from benchmarks.results import Row


def draw(cases: Sequence[Case], rows: Sequence[Row], found: Peaks, path: Path) -> bool:
    """Writes the picture where a case is part of a series; returns whether it did."""
    if not any(case.series for case in cases):
        return False
    figure, (rate, batch, memory) = plt.subplots(1, 3, figsize=(18, 5.5))
    places = {case.name: case.at for case in cases if case.series == "length"}
    _lines(rate, places, rows, lambda row: row.rate / 1e9)
    lengths = sorted(places.values())
    for name, peak, size in (("float32", found.float32, 4), ("bfloat16", found.bfloat16, 2)):
        # Forward and backward: 14 d n^2 / 2 operations on 4 + 7 rows of d elements a token.
        roof = [min(peak, found.copy * 7 * n / (11 * size)) / 1e9 for n in lengths]
        rate.plot(lengths, roof, "k--" if size == 4 else "k:", label=f"roofline {name}")
    _label(rate, "tokens of one sequence", "useful GFLOP/s, forward and backward")
    _lines(memory, places, rows, lambda row: row.mebibytes)
    first = min(lengths)
    memory.plot(lengths, [16 * n / first for n in lengths], "k--", label="growing as n")
    _label(memory, "tokens of one sequence", "MiB that a call adds")
    _lines(batch, {c.name: c.at for c in cases if c.series == "batch"}, rows, lambda row: row.seconds.median * 1e3)
    _label(batch, "sequences of 1,024 tokens", "ms, forward and backward")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return True


def _lines(axes: Axes, places: dict[str, int], rows: Sequence[Row], value) -> None:
    for variant in dict.fromkeys(row.variant for row in rows if row.case in places):
        points = [(places[r.case], value(r)) for r in rows if r.case in places and r.variant == variant]
        points = sorted(point for point in points if point[1] is not None)
        axes.plot(*zip(*points, strict=True), marker="o", label=variant)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)

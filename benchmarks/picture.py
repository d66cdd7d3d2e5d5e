"""What the pictures of benchmarks with series share: a line for each variant, on axes of powers of two.

matplotlib is imported when one is drawn: benchmarks.gpu runs where it is not installed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(count: int, size: tuple[float, float]) -> "tuple[Figure, Sequence[Axes]]":
    """A figure with axes beside one another. size: inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=size)


def lines(axes: "Axes", places: dict[str, int], rows: Sequence[Row], value) -> None:
    for variant in dict.fromkeys(row.variant for row in rows if row.case in places):
        points = [(places[r.case], value(r)) for r in rows if r.case in places and r.variant == variant]
        points = sorted(point for point in points if point[1] is not None)
        axes.plot(*zip(*points, strict=True), marker="o", label=variant)


def label(axes: "Axes", x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.3)
    if axes.lines:  # none where --case left the series out
        axes.legend(fontsize=7)

"""The table of a grid's cells, its fits as JSON, and the picture. Only `draw` imports matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from gr.files import write_json
from gr.scaling.fit import Fit, least_loss

TABLE, FITS = "cells", "fit.json"


def write(out: Path, rows: Sequence[Mapping[str, Any]], fits: Sequence[Fit], floor: float | None) -> None:
    """Writes cells.parquet, cells.csv and fit.json into the grid's folder."""
    table = pa.Table.from_pylist([dict(row) for row in rows])
    parquet.write_table(table, out / f"{TABLE}.parquet")
    csv.write_csv(table, out / f"{TABLE}.csv")
    write_json(out / FITS, {"floor": floor, "towers": [fit.summary() for fit in fits]})


def draw(fits: Sequence[Fit], floor: float | None, path: Path) -> None:
    """Loss by parameters at equal FLOPs, a panel a tower; and the best loss and HR@10 by FLOPs, all towers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(fits) + 2, figsize=(4.6 * (len(fits) + 2), 4.2))
    for axis, fit in zip(axes, fits, strict=False):
        _draw_budgets(axis, fit, plt.get_cmap("viridis"))
        if floor is not None:
            axis.axhline(floor, color="black", linewidth=0.8, linestyle=":")
    losses, hits = axes[-2:]
    for fit in fits:
        chosen, cells = fit.optima, fit.cells
        budgets = np.unique(cells.budget)
        best = [least_loss(cells, budget, "hr@10") for budget in budgets]
        losses.plot([o.budget for o in chosen], [o.loss for o in chosen], "o-", label=fit.tower)
        hits.plot(budgets, best, "o-", label=fit.tower)
    losses.set(title="least loss at a budget", xlabel="FLOPs", ylabel="nats an event", xscale="log")
    hits.set(title="HR@10 of the cell of least loss", xlabel="FLOPs", ylabel="HR@10", xscale="log")
    if floor is not None:
        losses.axhline(floor, color="black", linewidth=0.8, linestyle=":", label="exact inference")
    for axis in (losses, hits):
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_budgets(axis: Any, fit: Fit, colours: Any) -> None:
    """Cells as points, the law as lines over the sizes that were run, the optima as stars."""
    cells, budgets = fit.cells, np.unique(fit.cells.budget)
    for budget, colour in zip(budgets, colours(np.linspace(0, 0.9, len(budgets))), strict=True):
        own = cells.budget == budget
        axis.plot(cells.N[own], cells.L[own], "o", color=colour, markersize=4, label=f"{budget:.0e} FLOPs")
        sizes, place = np.unique(cells.N[own], return_index=True)
        axis.plot(sizes, fit.law(sizes, cells.D[own][place]), color=colour, linewidth=1)
    inside = [each for each in fit.optima if each.inside]
    axis.plot([o.N for o in inside], [o.loss for o in inside], "k*", markersize=9, label="optimum")
    axis.set(title=fit.tower, xlabel="parameters of the dense part", ylabel="nats an event", xscale="log")
    axis.xaxis.set_minor_formatter("")  # whose labels would overlap
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def lines(fit: Fit) -> list[str]:
    """A fit in words and figures, a line each."""
    law, cells = fit.law, fit.cells
    decades = np.log10(cells.budget.max() / cells.budget.min())
    text = [
        f"{fit.tower}: {len(cells)} cells over {decades:.1f} decades of FLOPs",
        f"  L = {law.E:.4f} + {law.A:.4g} / N^{law.a:.4f} + {law.B:.4g} / D^{law.b:.4f} nats",
    ]
    for name, interval in fit.intervals.items():
        share = f", half {100 * interval.half_width:.0f} %" if interval.value else ""
        text.append(f"  {name}: {interval.value:.4f} ({interval.low:.4f} to {interval.high:.4f}{share})")
    edge = sum(not each.inside for each in fit.optima)
    text += [f"  {each.budget:.0e} FLOPs: N {each.N:,.0f}, {each.loss:.4f} nats" for each in fit.optima if each.inside]
    if edge:
        text.append(f"  {edge} budgets have their optimum at the edge of the widths, and are not counted in isoFLOP")
    if fit.prediction is None:
        return [*text, "  the largest budget is not predicted: the others have too few cells"]
    errors, measured = fit.prediction.errors, fit.prediction.measured
    best = errors[measured.argmin()]
    return [
        *text,
        f"  {fit.prediction.budget:.0e} FLOPs, predicted from the smaller ones: {np.abs(errors).mean():.4f} nats off "
        f"in the mean of {len(errors)} cells, {best:+.4f} at the best",
    ]

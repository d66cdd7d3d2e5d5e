"""The picture of runs: loss and metrics by step. Imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from gr.metrics.compare import Run

# The first of each that a run has.
_SHOWN = (("hr@10", "auc", "lifetime/auc"), ("ndcg@10", "ne", "lifetime/ne"))


def draw(runs: Sequence[Run], labels: Sequence[str], path: Path) -> None:
    """Writes the picture; the suffix of its path chooses the format."""
    kind = runs[0].evaluated
    names = [_shown(runs[0], choices) for choices in _SHOWN] if kind else []
    panels = [("train", "loss"), *((kind, name) for name in names if kind and name)]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for axis, (record_kind, name) in zip(axes[0], panels, strict=True):
        for run, label in zip(runs, labels, strict=True):
            if points := run.curve(record_kind, name):
                axis.plot(
                    *zip(*points, strict=True), label=label, linewidth=1.6, marker="." if len(points) < 40 else ""
                )
        title = "training loss, mean since the point before" if record_kind == "train" else f"{record_kind} {name}"
        axis.set(title=title, xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(run: Run, choices: Sequence[str]) -> str | None:
    """The metric of the run's records, of its first task where there are several."""
    names = list(run.last)
    return next((name for end in choices for name in names if name == end or name.endswith(f"/{end}")), None)

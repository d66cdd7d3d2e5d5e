"""Draws validation curves of runs beside the baselines of their reports.

python -m benchmarks.curves OUT.png RUN [RUN ...]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = ("hr@10", "ndcg@10")


def main() -> None:
    out, runs = sys.argv[1], [Path(run) for run in sys.argv[2:]]
    figure, axes = plt.subplots(1, len(METRICS), figsize=(11, 4.2))
    for axis, metric in zip(axes, METRICS, strict=True):
        for run in runs:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            points = [(line["step"], line[metric]) for line in lines if line["kind"] == "validation"]
            axis.plot(*zip(*points, strict=True), label=run.name, linewidth=1.6)
        baselines = json.loads((runs[0] / "report.json").read_text())["baselines"]
        for style, (name, metrics) in zip(("--", "-.", ":"), baselines.items(), strict=False):
            axis.axhline(metrics[metric], color="grey", linestyle=style, linewidth=1, label=f"{name} (test)")
        axis.set(xlabel="step", ylabel=f"validation {metric}", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()

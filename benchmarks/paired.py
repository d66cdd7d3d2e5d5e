"""Paired comparison of two groups of runs on the same test users.

    python -m benchmarks.paired RUN [RUN ...] --against RUN [RUN ...]

Each run folder holds test-ranks.npy. A user's metric is averaged over the runs (seeds) of a group; the standard error
is over users. More than two standard errors is a difference.
"""

import json
import sys
from pathlib import Path

import numpy as np

from gr.metrics.retrieval import paired_difference, user_metrics

SHOWN = ("hr@10", "ndcg@10", "mrr")


def main() -> None:
    split = sys.argv.index("--against")
    groups = [[Path(run) for run in part] for part in (sys.argv[1:split], sys.argv[split + 1 :])]
    for group in groups:
        for run in group:
            report = json.loads((run / "report.json").read_text())
            metrics = "  ".join(f"{name} {report['model'][name]:.4f}" for name in SHOWN)
            print(f"{run}: step {report['step']}, filter {report['filter_seen']}, {report['users']} users  {metrics}")
    for name in SHOWN:
        ours, theirs = (
            np.mean([user_metrics(np.load(run / "test-ranks.npy"))[name] for run in group], axis=0) for group in groups
        )
        mean, error = paired_difference(ours, theirs)
        print(f"{name}: {ours.mean():.4f} against {theirs.mean():.4f}, difference {mean:+.4f} +- {error:.4f}")


if __name__ == "__main__":
    main()

"""Paired comparison of two groups of runs on the same test users.

    python -m benchmarks.paired RUN [RUN ...] --against RUN [RUN ...]

`gr compare` for groups of runs: a user's metric is averaged over the runs (seeds) of a group.
"""

import sys
from pathlib import Path

from gr.errors import DataError
from gr.metrics.compare import Run, paired, unpaired

SHOWN = ("hr@10", "ndcg@10", "mrr")


def main() -> None:
    split = sys.argv.index("--against")
    groups = [[Run.open(Path(run)) for run in part] for part in (sys.argv[1:split], sys.argv[split + 1 :])]
    runs = [run for group in groups for run in group]
    for run in runs:
        if reason := unpaired(runs[0], run):
            raise DataError(reason)
        metrics = "  ".join(f"{name} {run.metrics[name]:.4f}" for name in SHOWN)
        report = run.report
        print(f"{run.path}: step {report['step']}, filter {report['filter_seen']}, {report['users']} users  {metrics}")
    ours, theirs = ([run.ranks for run in group] for group in groups)
    for test in paired(theirs, ours, SHOWN):
        print(f"{test.name}: difference {test.difference:+.4f} +- {test.error:.4f}, p {test.p:.2g}")


if __name__ == "__main__":
    main()

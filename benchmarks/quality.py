"""A retrieval recipe on one data set: its seeds, and paired tests against baselines and other runs on the same users.

    python -m benchmarks.quality RUN [RUN ...] [--against RUN [RUN ...]]

RUN: finished runs of one configuration, which differ in their seed alone. The baselines are those of the report, with
settings chosen on the event before the target. It prints rows for docs/results.md.
"""

import sys
from pathlib import Path

import numpy as np

from gr.config import RetrievalConfig
from gr.data.dataset import Dataset
from gr.errors import DataError
from gr.metrics.compare import Run, paired, unpaired
from gr.metrics.retrieval import retrieval_metrics
from gr.recipes.baselines import Targets, evaluate_baselines

SHOWN = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "mrr")
TESTED = ("hr@10", "ndcg@10")


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--against") if "--against" in arguments else len(arguments)
    ours, others = ([Run.open(Path(run)) for run in part] for part in (arguments[:split], arguments[split + 1 :]))
    for run in (*ours, *others):
        if reason := unpaired(ours[0], run):
            raise DataError(reason)
    own = [_ranks(run) for run in ours]
    for run, ranks in zip(ours, own, strict=True):
        _row(f"seed {run.config.seed}, step {run.report['step']}", [ranks])
    _row(f"mean of {len(own)} seeds", own)
    against = _baselines(ours[0])
    if others:
        against["other runs"] = [_ranks(run) for run in others]
    for name, ranks in against.items():
        _row(name, ranks)
    for name, ranks in against.items():
        for test in paired(ranks, own, TESTED):
            print(f"above {name}: {test.name} {test.difference:+.4f} +- {test.error:.4f}, p {test.p:.2g}")


def _baselines(run: Run) -> dict[str, list[np.ndarray]]:
    config = run.config
    assert isinstance(config, RetrievalConfig)
    train = Dataset.open(Path(config.data.path))
    data = Dataset.open(Path(config.evaluation.path)) if config.evaluation.path else train
    targets = Targets(data, 1, config.evaluation.filter_seen, config.data.max_length, config.data.on_bad_row)
    names = type(config.evaluation)().baselines  # also where the run itself left them out
    scored = evaluate_baselines(train, targets, names=names, train_holdout=config.data.train_holdout)
    return {f"{name} ({each.setting})" if each.setting else name: [each.rank_B] for name, each in scored.items()}


def _ranks(run: Run) -> np.ndarray:
    assert run.ranks is not None, "unpaired() has looked"
    return run.ranks


def _row(name: str, runs: list[np.ndarray]) -> None:
    """Means over the runs, and of several the least and the greatest HR@10."""
    metrics = [retrieval_metrics(ranks) for ranks in runs]
    means = " | ".join(f"{np.mean([each[column] for each in metrics]):.4f}" for column in SHOWN)
    hits = [each["hr@10"] for each in metrics]
    print(f"| {name} | {means} |" + (f" {min(hits):.4f} to {max(hits):.4f} |" if len(hits) > 1 else ""))


if __name__ == "__main__":
    main()

"""Runs side by side, from what they left in their folders. Imports no torch."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gr.config import load_config
from gr.config.run import RunConfig
from gr.errors import ConfigError, DataError
from gr.files import read_json
from gr.logging import get_logger
from gr.metrics.retrieval import paired_difference, user_metrics

log = get_logger(__name__)
PAIRED = ("hr@10", "ndcg@10")
_RESAMPLES = 9999
_NORMAL_FROM = 5_000  # users whose metrics differ; below, signs are drawn
_EVALUATED = ("validation", "next_window", "prequential")


@dataclass(frozen=True)
class Run:
    """A run folder. report: report.json, empty before the run is done. records: of metrics.jsonl, in file order."""

    path: Path
    config: RunConfig
    report: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @classmethod
    def open(cls, path: Path, plugins: Collection[str] = ()) -> "Run":
        """plugins: modules that its configuration may have imported. Raises ConfigError for a folder that is no run,
        DataError for a file in it that is no such file.
        """
        if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
            raise ConfigError(
                f"{path}: is no run folder (it lacks config.yaml or metrics.jsonl): name the run_dir of a `gr train`"
            )
        return cls(path, load_config(path / "config.yaml", plugins=plugins), _report(path), _records(path))

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the report; empty where there is none."""
        return self.report.get("model", {})

    def curve(self, kind: str, name: str) -> list[tuple[int, float]]:
        """Step and value of the records of a kind that have a metric."""
        return [(r["step"], r[name]) for r in self.records if r.get("kind") == kind and name in r]

    @property
    def evaluated(self) -> str | None:
        """The kind of records that follow the model's quality through the run: on held-out data if there are such."""
        kinds = {record.get("kind") for record in self.records}
        return next((kind for kind in _EVALUATED if kind in kinds), None)

    @property
    def last(self) -> Mapping[str, float]:
        """The last record of that kind."""
        records = [record for record in self.records if record.get("kind") == self.evaluated]
        return {name: value for name, value in (records[-1] if records else {}).items() if _is_metric(name, value)}

    @cached_property
    def ranks(self) -> np.ndarray | None:
        """The place of each user's item, float64 [users], in the order of the data; None where the run has none."""
        path = self.path / "test-ranks.npy"
        if not path.exists():
            return None
        try:
            ranks = np.load(path, allow_pickle=False)
            user_metrics(ranks)
        except (ValueError, EOFError, TypeError) as error:
            raise DataError(f"{path}: is not the ranks of users: {error}") from None
        return ranks


@dataclass(frozen=True)
class Paired:
    """A metric on the same users. difference: mean of theirs - ours. error: its standard error. p: two-sided."""

    name: str
    difference: float
    error: float
    p: float


def unpaired(ours: Run, theirs: Run) -> str | None:
    """Why two runs cannot be compared user by user; None where they can."""
    for run in (ours, theirs):
        if run.ranks is None:
            return f"{run.path} has no metrics by user (test-ranks.npy): only finished retrieval runs have"
    for name in ("evaluation_data", "split", "filter_seen", "users"):
        mine, other = (run.report.get(name) for run in (ours, theirs))
        if mine != other or mine is None:
            shown = f": {mine} and {other}" if isinstance(mine, str | int) else " (report.json)"
            return f"{ours.path} and {theirs.path} were not tested on the same users alike: {name} differs{shown}"
    return None


def paired(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], names: Sequence[str] = PAIRED) -> list[Paired]:
    """Paired tests of two groups of runs. A user's metric is its mean over the runs (seeds) of a group.

    ours, theirs: the ranks of each run, [users]. Raises ValueError where the numbers of users differ.
    """
    metrics = [[user_metrics(ranks) for ranks in group] for group in (ours, theirs)]
    tests = []
    for name in names:
        mine, other = (np.mean([run[name] for run in group], axis=0) for group in metrics)
        tests.append(Paired(name, *paired_difference(other, mine), sign_flip_p(other - mine)))
    return tests


def sign_flip_p(differences: np.ndarray) -> float:
    """The chance that the mean of differences is as far from 0 where their signs are drawn at random, two-sided.

    For a metric of 0 and 1 it is McNemar's test. 9,999 draws of a fixed seed, or from 5,000 differences that are not 0
    on the normal distribution to which the draws tend. differences: [users].
    """
    there = differences[differences != 0]
    if not len(there):
        return 1.0
    if len(there) >= _NORMAL_FROM:
        return float(2 * stats.norm.sf(abs(there.sum()) / np.sqrt((there**2).sum())))
    test = stats.permutation_test(
        (there,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, 4_000_000 // len(there)),
        random_state=np.random.default_rng(0),
    )
    return float(test.pvalue)


def common(runs: Sequence[Run]) -> tuple[str, dict[str, list[float]]]:
    """The kind of the metrics, and those that all runs have: of tests, or of last records where a run is not done."""
    tested = all(run.metrics for run in runs)
    measured = [run.metrics if tested else run.last for run in runs]
    values = {
        name: [float(metrics[name]) for metrics in measured]
        for name in (measured[0] if measured else {})
        if all(_is_metric(name, metrics.get(name)) for metrics in measured)
    }
    kinds = dict.fromkeys(str(run.evaluated) for run in runs)
    return "test" if tested else f"last {' and '.join(kinds)}", values


def _is_metric(name: str, value: Any) -> bool:
    return name not in ("step", "kind", "time") and isinstance(value, int | float)


def _report(path: Path) -> Mapping[str, Any]:
    file = path / "report.json"
    if not file.exists():
        return {}
    remedy = f"`gr evaluate --checkpoint {path}` measures again"
    report = read_json(file, DataError, remedy)
    if not isinstance(report.get("model"), dict):
        raise DataError(f"{file}: is not the report of a run; {remedy}")
    return report


def _records(path: Path) -> list[Mapping[str, Any]]:
    lines = (path / "metrics.jsonl").read_bytes().splitlines()
    records: list[Mapping[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    if (damaged := len(lines) - len(records)) > 0:
        log.warning("%s/metrics.jsonl: %d of %d lines are no records: left out", path, damaged, len(lines))
    return records

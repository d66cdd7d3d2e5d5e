"""Baselines that need no training loop: popularity, item-kNN, a Markov chain and EASE^R. What a model must beat.

B users, E item ids (rows of the item table), T packed history tokens. Same split, window, candidates and seen items
as a model's evaluation (evaluation_batches in gr/data/history_batches.py). Each is at its best: its settings are those
with the highest NDCG@10 on the events before the targets, as a model's are chosen on validation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from gr.batch import EvaluationBatch
from gr.config.histories import HistoryDataConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import UserBatches, evaluation_batches
from gr.errors import DataError
from gr.logging import get_logger
from gr.metrics.retrieval import retrieval_metrics

log = get_logger(__name__)
# (newest items, decay of their weight); the first is what the search starts from.
WINDOWS = ((10, 0.8), (1, 1.0), *product((2, 3, 5, 10, 20, 50), (0.6, 0.7, 0.8, 0.9, 1.0)))
TUNING_USERS = 1024  # at most so many, evenly over the file: the settings lie further apart than their noise
EASE_ITEMS = 1 << 13  # an inverse of more items takes more than half a TFLOP, of which a choice takes four
_SCORES_PER_CHUNK = 1 << 22
BadRows = Literal["fail", "skip"]
Matrix: TypeAlias = sp.csr_array | np.ndarray


@dataclass(frozen=True)
class Histories:
    """Packed items of each row group of training data, without each user's newest `holdout`, and the lengths left."""

    train: Dataset
    holdout: int
    on_bad_row: BadRows = "fail"

    @property
    def items(self) -> int:
        return self.train.schema.item_cardinality

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index in range(len(self.train.row_groups)):
            group = self.train.read_row_group(index, ["item_ids"], self.on_bad_row)
            from_end = np.repeat(group.offsets[1:], group.lengths_B) - np.arange(group.offsets[-1])
            items_T = group.columns["item_ids"][from_end > self.holdout]
            yield items_T, np.maximum(group.lengths_B - self.holdout, 0)

    @cached_property
    def shared_EE(self) -> sp.csr_array:
        """How many users have both items; a repeated item counts once."""
        shared = sp.csr_array((self.items, self.items))
        for items_T, length_B in self:
            user_T = np.repeat(np.arange(len(length_B)), length_B)
            block = sp.csr_array((np.ones(len(items_T)), (user_T, items_T)), shape=(len(length_B), self.items))
            block.data[:] = 1.0
            shared = shared + block.T @ block
        return shared


@dataclass(frozen=True)
class Scorer:
    """Scores of all items: sum over a user's newest `last` items of decay**age * matrix[item], plus prior.

    matrix: [E, E] or None. prior: [E] or None.
    """

    last: int = 0
    decay: float = 1.0
    matrix: Matrix | None = None
    prior: np.ndarray | None = None

    def scores_BE(self, items_T: np.ndarray, length_B: np.ndarray, items: int) -> np.ndarray:
        """float64 [B, E] for packed histories, oldest first."""
        out = np.zeros((len(length_B), items))
        if self.matrix is not None:
            ends = np.cumsum(length_B)
            user_T = np.repeat(np.arange(len(length_B)), length_B)
            age_T = ends[user_T] - 1 - np.arange(len(items_T))
            recent_T = age_T < self.last
            weights = self.decay ** age_T[recent_T].astype(np.float64)
            recent = sp.csr_array((weights, (user_T[recent_T], items_T[recent_T])), shape=(len(length_B), items))
            scores = recent @ self.matrix
            out += scores.toarray() if sp.issparse(scores) else scores
        return out if self.prior is None else out + self.prior


def popularity(histories: Histories) -> np.ndarray:
    """Events of each item, [E]."""
    return sum((np.bincount(items_T, minlength=histories.items) for items_T, _ in histories), np.zeros(histories.items))


def item_knn(histories: Histories, shrink: float) -> Matrix:
    """Cosine of the users two items share, shrunk: n_ij / (sqrt(n_i n_j) + shrink), 0 on the diagonal."""
    shared = histories.shared_EE.tocoo()
    count = shared.diagonal()
    value = shared.data / (np.sqrt(count[shared.row] * count[shared.col]) + shrink)
    value[shared.row == shared.col] = 0.0
    return sp.csr_array((value, (shared.row, shared.col)), shape=shared.shape)


def markov(histories: Histories, reach: float) -> Matrix:
    """The share that each item has among an item's successors up to `reach` events later."""
    counts = sp.csr_array((histories.items, histories.items))
    for items_T, length_B in histories:
        user_T = np.repeat(np.arange(len(length_B)), length_B)
        for skip in range(1, int(reach) + 1):
            same = user_T[skip:] == user_T[:-skip]
            pairs = (items_T[:-skip][same], items_T[skip:][same])
            counts = counts + sp.csr_array((np.ones(len(pairs[0])), pairs), shape=counts.shape)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    return sp.csr_array(sp.diags_array(1.0 / np.maximum(totals, 1.0)) @ counts)


def ease(histories: Histories, l2: float) -> Matrix:
    """EASE^R (Steck, arXiv 1905.03375, Eq. 8): the linear model of items on items that ridge regression gives.

    With P = (X^T X + l2 I)^-1 of the users' items X, the weight of i for j is -P_ij / P_jj, 0 on the diagonal.
    """
    gram_EE = torch.from_numpy(histories.shared_EE.toarray().astype(np.float32))
    gram_EE.diagonal().add_(l2)
    inverse_EE = torch.cholesky_inverse(torch.linalg.cholesky(gram_EE))
    weights_EE = inverse_EE / -inverse_EE.diagonal()
    weights_EE.fill_diagonal_(0.0)
    return weights_EE.numpy()


class Baseline(NamedTuple):
    """fit: from histories and a value of `parameter` to the matrix of a Scorer. values: those tried, in order."""

    fit: Callable[[Histories, float], Matrix]
    parameter: str
    values: tuple[float, ...]


# Popularity has no settings.
TUNED: Mapping[str, Baseline] = {
    "item_knn": Baseline(item_knn, "shrink", (10, 0, 100)),
    "markov": Baseline(markov, "reach", (3, 1, 2, 5)),
    "ease": Baseline(ease, "l2", (300, 100, 1000)),
}
BASELINES = ("popularity", *TUNED)


class Scored(NamedTuple):
    """rank_B: the place of each user's target, float64; 1 is best, ties get their mean. setting: what was chosen."""

    rank_B: np.ndarray
    setting: str


@dataclass(frozen=True)
class Targets:
    """The users whose targets are ranked. target_from_end: 1 is the newest event."""

    data: Dataset
    target_from_end: int
    filter_seen: Literal["window", "all", "none"]
    max_length: int
    on_bad_row: BadRows = "fail"

    def batches(self, rows_N: np.ndarray | None = None) -> UserBatches:
        items = self.data.schema.item_cardinality
        return evaluation_batches(
            self.data,
            HistoryDataConfig(path=str(self.data.path), max_length=self.max_length, on_bad_row=self.on_bad_row),
            target_from_end=self.target_from_end,
            global_batch_size=min(max(_SCORES_PER_CHUNK // items, 1), 1024),
            filter_seen=self.filter_seen,
            rows_N=rows_N,
        )


def evaluate_baselines(
    train: Dataset, targets: Targets, *, names: Sequence[str], train_holdout: int
) -> dict[str, Scored]:
    """The rank of each user's target among all candidates that the user has not seen, for each named baseline.

    Users are those with an event before the target, in file order. train_holdout: newest events of each user of `train`
    that are not fitted on. Settings are chosen by the event before the targets, fitted without it. EASE^R is left out,
    with a line in the log, of more than EASE_ITEMS items. Memory: for item_knn and markov the non-zero item pairs, for
    ease all pairs. Raises DataError for an unknown name, item tables of different size, or no user to evaluate.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise DataError(f"no baseline is called {unknown[0]!r}; there are {', '.join(BASELINES)}")
    items, data = train.schema.item_cardinality, targets.data
    if data.schema.item_cardinality != items:
        raise DataError(
            f"{train.path} has item_cardinality {items}, {data.path} has {data.schema.item_cardinality}; "
            "train and evaluation must number their items alike"
        )
    candidate_E = np.zeros(items, dtype=bool)
    candidate_E[train.corpus()[0]] = True
    histories = Histories(train, train_holdout, targets.on_bad_row)
    # Of other users than those trained on, all of training comes before the targets.
    earlier = replace(targets, target_from_end=targets.target_from_end + 1)
    held_out = max(train_holdout, earlier.target_from_end) if train.path == data.path else train_holdout
    # The same object where it can be, which counts the users of pairs once.
    before = histories if held_out == train_holdout else replace(histories, holdout=held_out)
    batches: list[EvaluationBatch] = []
    if any(name in TUNED for name in names):
        rows_N = np.linspace(0, data.rows - 1, min(data.rows, TUNING_USERS)).astype(np.int64)
        batches = list(earlier.batches(np.unique(rows_N)))
    scorers: dict[str, tuple[Scorer, str]] = {}
    for name in names:
        if name == "popularity":
            scorers[name] = Scorer(prior=popularity(histories)), ""
        elif name == "ease" and items > EASE_ITEMS:
            log.info("%s: EASE^R is left out: its matrix of %s items is too large", train.path, f"{items:,}")
        else:
            baseline = TUNED[name]
            value, window = _choose(baseline, before, batches, candidate_E)
            setting = f"{baseline.parameter} {value:g}, newest {window[0]}, decay {window[1]:g}"
            scorers[name] = Scorer(*window, baseline.fit(histories, value)), setting
    parts: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    for batch in targets.batches():
        for name, (scorer, _) in scorers.items():
            parts[name].append(_ranks(batch, scorer, candidate_E))
    if any(not sum(map(len, each)) for each in parts.values()):
        raise no_targets(data.path)
    return {name: Scored(np.concatenate(parts[name]), setting) for name, (_, setting) in scorers.items()}


def _choose(
    baseline: Baseline, before: Histories, batches: Sequence[EvaluationBatch], candidate_E: np.ndarray
) -> tuple[float, tuple[int, float]]:
    """The value of the parameter and the window of the highest NDCG@10: first the window, then the value."""

    def ndcg(matrix: Matrix, window: tuple[int, float]) -> float:
        scorer = Scorer(*window, matrix)
        ranks = np.concatenate([np.empty(0), *(_ranks(batch, scorer, candidate_E) for batch in batches)])
        return retrieval_metrics(ranks)["ndcg@10"] if len(ranks) else 0.0  # of too short histories: the first settings

    value, matrix = baseline.values[0], baseline.fit(before, baseline.values[0])
    best, window = max(((ndcg(matrix, each), each) for each in WINDOWS), key=lambda pair: pair[0])
    for other in baseline.values[1:]:
        if (score := ndcg(baseline.fit(before, other), window)) > best:
            best, value = score, other
    return value, window


def no_targets(path: Path) -> DataError:
    """The error of evaluation data whose users are all too short."""
    return DataError(
        f"{path}: no user has an event before the held-out one, so there is nothing to evaluate: name other users"
    )


def _ranks(batch: EvaluationBatch, scorer: Scorer, candidate_E: np.ndarray) -> np.ndarray:
    items_T, length_B = batch.features.values().numpy(), batch.features.lengths().numpy()
    scores_BE = scorer.scores_BE(items_T, length_B, len(candidate_E))
    row_B = np.arange(len(length_B))
    target_B1 = scores_BE[row_B, batch.target_ids_B.numpy()][:, None]
    user_S = np.repeat(row_B, np.diff(batch.seen_offsets.numpy()))
    scores_BE[user_S, batch.seen_ids.numpy()] = -np.inf
    scores_BE[:, ~candidate_E] = -np.inf
    scores_BE[row_B, batch.target_ids_B.numpy()] = -np.inf  # the target does not compete with itself
    ranks = 1.0 + (scores_BE > target_B1).sum(axis=1) + (scores_BE == target_B1).sum(axis=1) / 2.0
    return ranks[batch.valid_B.numpy()]

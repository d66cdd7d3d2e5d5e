"""Logistic regression and gradient boosting on target encodings: what DLRM must match on the same rows.

    pip install 'scikit-learn>=1.9'
    python -m benchmarks.tabular_baselines FOLDER            # FOLDER: terabyte-part-0.orc to terabyte-part-6.orc
    python -m benchmarks.tabular_baselines FOLDER --test-part 0 --test-part 1

Each fold trains on all parts but one and tests on that one; default: parts 4, 5 and 6. The settings below were chosen
from 8 of logistic regression and 60 of boosting by log loss on parts 0 to 3 alone, each of them held out in turn. One
thread, a few seconds a fold.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.orc
import scipy.sparse as sp
import torch

from benchmarks.compare import print_machine
from gr.dist import World
from gr.errors import DataError, InstallError
from gr.metrics.ranking import RankingMetrics, normalised_entropy

try:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import OneHotEncoder, TargetEncoder
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as missing:
    raise InstallError(
        f"benchmarks.tabular_baselines needs scikit-learn ({missing}): pip install 'scikit-learn>=1.9'"
    ) from missing

DENSE, SPARSE = 13, 26
MISSING_ID = -1
PARTS = 7
TEST_PARTS = (4, 5, 6)
SHOWN = ("auc", "log_loss", "ne", "calibration", "accuracy", "base_rate", "cpu_seconds")

HASH_BITS = 18
SEEN = 2  # rows from which a category has a weight of its own, as DLRM's vocabulary has it
INVERSE_PENALTY = 0.05  # C of LogisticRegression
SMOOTHING = 100.0  # examples of the mean label that a category's own are mixed with
BOOSTING = {
    "learning_rate": 0.05,
    "max_iter": 100,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 300,
    "max_features": 0.3,
    "l2_regularization": 1.0,
    "early_stopping": False,
    "random_state": 0,
}


@dataclass(frozen=True)
class Rows:
    """N examples of Criteo's 13 counts and 26 categories."""

    dense_NI: np.ndarray  # float32 [N, 13], NaN where missing
    sparse_NC: np.ndarray  # int64 [N, 26], MISSING_ID where missing
    labels_N: np.ndarray  # int64, 0 or 1

    def __len__(self) -> int:
        return len(self.labels_N)


def read_orc(path: Path) -> Rows:
    """Columns label, i1 to i13 and c1 to c26, each a list of one value or none. Raises DataError."""
    try:
        table = pyarrow.orc.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path} is not there; give the folder of the terabyte-part-N.orc files") from None
    wanted = ["label", *(f"i{i}" for i in range(1, DENSE + 1)), *(f"c{i}" for i in range(1, SPARSE + 1))]
    if absent := [name for name in wanted if name not in table.column_names]:
        raise DataError(f"{path} has no column {', '.join(absent)}; it has {', '.join(table.column_names)}")
    label, *features = (_one_or_missing(path, name, table[name].combine_chunks()) for name in wanted)
    dense = np.stack([column.to_numpy(zero_copy_only=False) for column in features[:DENSE]], axis=1)
    sparse = np.stack([column.fill_null(MISSING_ID).to_numpy() for column in features[DENSE:]], axis=1)
    labels = label.to_numpy(zero_copy_only=False)
    if not np.isin(labels, (0, 1)).all():
        raise DataError(f"{path} has labels other than 0 and 1")
    return Rows(dense.astype(np.float32), sparse, labels.astype(np.int64))


def _one_or_missing(path: Path, name: str, lists: pa.ListArray) -> pa.Array:
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    if (lengths > 1).any():
        raise DataError(f"{path}, column {name}: row {int((lengths > 1).argmax())} has more than one value")
    values = lists.flatten()
    place = np.where(lengths == 1, lengths.cumsum() - 1, 0)
    return values.take(pa.array(place, mask=lengths == 0))


def concatenate(parts: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([part.dense_NI for part in parts]),
        np.concatenate([part.sparse_NC for part in parts]),
        np.concatenate([part.labels_N for part in parts]),
    )


def logistic_regression(train: Rows, test: Rows) -> np.ndarray:
    """Probability of each test row, [N], from L2-regularised logistic regression on hashed_features()."""
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=500).fit(hashed_features(train), train.labels_N)
    return model.predict_proba(hashed_features(test))[:, 1]


def logistic_regression_of_ids(train: Rows, test: Rows) -> np.ndarray:
    """Probability of each test row, [N], from L2-regularised logistic regression on what DLRM reads.

    These are log(1 + count), 0 where missing or negative, and a weight for each category that SEEN training rows have;
    the others of a column share one.
    """
    encoder = OneHotEncoder(min_frequency=SEEN, handle_unknown="infrequent_if_exist").fit(train.sparse_NC)

    def features(rows: Rows) -> sp.csr_array:
        logs_NI = np.log1p(np.maximum(np.nan_to_num(rows.dense_NI), 0))
        return sp.hstack([encoder.transform(rows.sparse_NC), sp.csr_array(logs_NI)], format="csr")

    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=500).fit(features(train), train.labels_N)
    return model.predict_proba(features(test))[:, 1]


def hashed_features(rows: Rows) -> sp.csr_array:
    """[N, 2^HASH_BITS]: 1 at each category and at each count, which is rounded down to a power of sqrt(2) from 1 on."""
    levels = np.floor(2 * np.log2(np.maximum(rows.dense_NI, 1)))
    levels = np.where(rows.dense_NI < 1, rows.dense_NI - 1, levels)  # 0 and -1 stay apart from 1
    levels = np.where(np.isnan(rows.dense_NI), 1 << 20, levels).astype(np.int64)
    values = np.concatenate([levels, rows.sparse_NC], axis=1).astype(np.uint64)
    fields = np.arange(values.shape[1], dtype=np.uint64)
    index = _mix(values + _mix(fields)) >> np.uint64(64 - HASH_BITS)
    N, F = values.shape
    matrix = sp.csr_array((np.ones(N * F), index.astype(np.int32).ravel(), np.arange(N + 1) * F), (N, 1 << HASH_BITS))
    matrix.sum_duplicates()
    return matrix


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalising steps of MurmurHash3, 64 bit."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def boosting(train: Rows, test: Rows) -> np.ndarray:
    """Probability of each test row, [N]: boosted trees on the counts, the categories' mean labels and frequencies.

    A training row's mean labels come from other folds of five, so that they do not contain its own label.
    """
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    encoder = TargetEncoder(target_type="binary", smooth=SMOOTHING, cv=folds)
    encoded_NC = encoder.fit_transform(train.sparse_NC, train.labels_N)
    train_NF = np.hstack([train.dense_NI, encoded_NC, frequencies(train, train)])
    test_NF = np.hstack([test.dense_NI, encoder.transform(test.sparse_NC), frequencies(train, test)])
    model = HistGradientBoostingClassifier(**BOOSTING)
    return model.fit(train_NF, train.labels_N).predict_proba(test_NF)[:, 1]


def frequencies(train: Rows, rows: Rows) -> np.ndarray:
    """[N, 26]: how many rows of `train` have the category."""
    out = np.empty(rows.sparse_NC.shape)
    for column in range(SPARSE):
        ids, counts = np.unique(train.sparse_NC[:, column], return_counts=True)
        place = np.searchsorted(ids, rows.sparse_NC[:, column]).clip(max=len(ids) - 1)
        out[:, column] = np.where(ids[place] == rows.sparse_NC[:, column], counts[place], 0)
    return out


BASELINES: dict[str, Callable[[Rows, Rows], np.ndarray]] = {
    "logistic_regression": logistic_regression,
    "logistic_regression_of_ids": logistic_regression_of_ids,
    "boosting": boosting,
}


def measure(train: Rows, test: Rows) -> dict[str, dict[str, float]]:
    """Metrics of each baseline (gr/metrics/ranking.py) and cpu_seconds; of "base rate", which ranks nothing, two."""
    rate = float(train.labels_N.mean())
    tested = float(test.labels_N.mean())
    loss = -(tested * np.log(rate) + (1 - tested) * np.log1p(-rate))
    found = {"base rate": {"log_loss": loss, "ne": normalised_entropy(loss, tested)}}
    for name, baseline in BASELINES.items():
        started = time.process_time()
        with threadpool_limits(1):
            probabilities = baseline(train, test)
        seconds = time.process_time() - started
        metrics = RankingMetrics(name, World(0, 1, 0, 1, torch.device("cpu")), predictions="probabilities")
        metrics.update(torch.from_numpy(probabilities), torch.from_numpy(test.labels_N))
        found[name] = metrics.compute() | {"cpu_seconds": seconds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tabular_baselines")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test-part", type=int, action="append", choices=range(PARTS), help="Again for more; 4, 5, 6.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        parts = [read_orc(arguments.folder / f"terabyte-part-{index}.orc") for index in range(PARTS)]
    except DataError as error:
        parser.error(str(error))
    print_machine()
    tested = arguments.test_part or TEST_PARTS
    folds = []
    for held_out in tested:
        train = concatenate([part for index, part in enumerate(parts) if index != held_out])
        folds.append(measure(train, parts[held_out]))
        print(f"\ntrained on {len(train)} rows, tested on part {held_out}: {len(parts[held_out])} rows")
        for name, values in folds[-1].items():
            print(_line(name, values))
    print(f"\nmean of parts {', '.join(map(str, tested))}")
    for name, values in folds[0].items():
        print(_line(name, {metric: float(np.mean([fold[name][metric] for fold in folds])) for metric in values}))


def _line(name: str, values: dict[str, float]) -> str:
    return f"  {name:28s}" + "  ".join(f"{metric} {values[metric]:.4f}" for metric in SHOWN if metric in values)


if __name__ == "__main__":
    main()

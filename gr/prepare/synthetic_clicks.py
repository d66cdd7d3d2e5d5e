"""Clicks drawn from a planted factorization machine (Rendle, ICDM 2010, equation 1), so that the best scores are known.

The generator, all of it from one seed (and numpy's sampling methods, which a new numpy may change):

1.  A dense value is log(x + 1) of a count x with P(x >= k) = 1 / (k + 1).
2.  An id of a column has rank r = 1..V with probability in proportion to r^-skew, V = cardinality - 1. Which of the
    ids 1..V has which rank is random in each column; id 0 (missing, rare or unseen) is never drawn. A row has `hots`
    ids in each column, independent, so an id may occur twice.
3.  logit = bias + a . dense + sum over columns c of w_c + sum over pairs c < d of v_c . v_d, where w_c adds the weights
    of the row's ids in column c and v_c their hidden vectors of width 2, both divided by sqrt(hots). All are normal
    draws, then moved in each column to mean 0 under the ids' distribution, so that a pair's product says nothing
    on average given either id: what comes before is the best additive approximation of the logit in squared error.
4.  a, w and v are scaled to the exact standard deviation of their terms over rows: 0.5, 0.7 and 1.5. bias: mean
    probability 0.2 on rows that are drawn for this alone.
5.  The label is 1 with probability 1 / (1 + exp(-logit)).

Row n of train/ and of test/ depends on every option but the numbers of rows. Train with data.shuffle=false for one
pass. Memory: 16 bytes an id of a column (about twice that while they are drawn) and 17 a test row, for the oracle.
Peak for 0.1 and 2 million rows of the defaults: 0.14 GB, and 1 and 4 s.

B rows of a chunk, N dense columns, C sparse columns, H ids of a row in one column, V ids of a column, K = 2.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy.optimize import brentq
from scipy.special import expit

from gr.errors import ConfigError
from gr.prepare.generate import random_stream, require_at_least, rows_between, size, stated, write_oracle
from gr.prepare.tabular import ROWS_PER_GROUP, column_names, dense_feature, tabular_table, write_tabular
from gr.schema import FORMAT_VERSION, DenseTransform, SourceRows, SparseColumn, TabularSchema

BASE_RATE, WIDTH = 0.2, 2
DENSE_SD, IDS_SD, PAIRS_SD = 0.5, 0.7, 1.5
# Standard deviation of log(x + 1), whose mean square is the sum over k of (log(k + 1)^2 - log(k)^2) / (k + 1).
_FEATURE_SD = 1.0844187
_CHUNK = ROWS_PER_GROUP  # rows drawn together; part of the definition, since each chunk has its own random stream
_LIMITS = {"rows": 1, "test_rows": 1, "columns": 2, "cardinality": 3, "dense": 1, "hots": 1, "seed": 0}
_MOST = {"cardinality": np.iinfo(np.int32).max} | dict.fromkeys(("rows", "test_rows", "seed"), np.iinfo(np.int64).max)
_REASONS = {
    "columns": "; an interaction is of two columns",
    "cardinality": "; id 0 is never drawn, and one id alone says nothing",
    "dense": "; the label follows the dense features too",
}
_LARGEST_SKEW = 3.0
Part = Literal["train", "test"]
_STREAMS = ("teacher", "settle", "train", "test")


@dataclass(frozen=True)
class ClickOptions:
    """Size of the two folders. Raises ConfigError for values the definition does not allow."""

    rows: int = size(20_000, "Rows of train/.")
    test_rows: int = size(5_000, "Rows of test/.")
    columns: int = size(8, "Columns of ids.")
    cardinality: int = size(100, "Rows of each table; no row has id 0.")
    dense: int = size(4, "Dense columns.")
    skew: float = size(1.05, "Exponent of Zipf's law; 0: all ids alike.")
    hots: int = size(1, "Ids of a row in each column.")
    seed: int = size(1)

    def __post_init__(self) -> None:
        require_at_least(self, _LIMITS, _REASONS)
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at most {most}; set {name} lower")
        if not 0 <= self.skew <= _LARGEST_SKEW:
            raise ConfigError(
                f"skew={self.skew}: must be from 0 (all ids alike) to {_LARGEST_SKEW:g} (one id has most of a column); "
                "set it in between"
            )


@dataclass(frozen=True)
class Clicks:
    """Rows and what they were drawn from. labels_B: int8. counts_BN: int64, before the transform. ids_BCH: int32.

    additive_B, logit_B: float64, the true logit without and with the products of pairs.
    """

    labels_B: np.ndarray
    counts_BN: np.ndarray
    ids_BCH: np.ndarray
    additive_B: np.ndarray
    logit_B: np.ndarray


class ClickStream:
    """The rows of one set of options; they can be drawn in any order."""

    def __init__(self, options: ClickOptions) -> None:
        self.options = options
        columns, ids = options.columns, options.cardinality - 1
        random = _random(options.seed, "teacher", 0)
        weight_V = np.arange(1, ids + 1, dtype=np.float64) ** -options.skew
        self.probability_V = weight_V / weight_V.sum()  # probability of rank V + 1
        self._below_V = np.cumsum(self.probability_V)
        self._below_V /= self._below_V[-1]
        dense_N = random.standard_normal(options.dense)
        self.dense_N = dense_N * (DENSE_SD / _FEATURE_SD / math.sqrt(dense_N @ dense_N))
        self.id_of_rank_CV = np.stack([random.permutation(ids).astype(np.int32) + 1 for _ in range(columns)])
        self.weight_CV = random.standard_normal((columns, ids), dtype=np.float32)
        self.hidden_CVK = random.standard_normal((columns, ids, WIDTH), dtype=np.float32)
        self._centre_and_scale()
        self.bias = 0.0
        sample = self._draw("settle", 0)
        self.bias = float(brentq(lambda bias: expit(sample.logit_B + bias).mean() - BASE_RATE, -100.0, 100.0))
        self._additive_slope, self._additive_bias = _fitted_logit(
            sample.additive_B, expit(sample.logit_B + self.bias), self.bias
        )

    def chunks(self, part: Part, first: int, stop: int) -> Iterator[Clicks]:
        """Rows [first, stop) of the part in order, in chunks of at most 16,384; from a multiple of it, whole ones."""
        yield from rows_between(partial(self._draw, part), _CHUNK, first, stop)

    def additive_logit(self, clicks: Clicks) -> np.ndarray:
        """float64 [B]: the logit without products of pairs, with the slope and bias of smallest log loss."""
        return self._additive_slope * (clicks.additive_B - self.bias) + self._additive_bias

    def _centre_and_scale(self) -> None:
        """Means 0 in each column, and over rows the standard deviations of the module's text, exactly.

        Columns are independent, so the variance of v_c . v_d is the trace of the product of their covariances.
        """
        p_V = self.probability_V
        self.weight_CV -= (self.weight_CV @ p_V)[:, None]
        self.weight_CV *= IDS_SD / math.sqrt((self.weight_CV.astype(np.float64) ** 2 @ p_V).sum())
        self.hidden_CVK -= np.einsum("cvk,v->ck", self.hidden_CVK, p_V)[:, None]
        covariance_CKK = np.stack([(vectors_VK.T * p_V) @ vectors_VK for vectors_VK in self.hidden_CVK])
        variance = ((covariance_CKK.sum(axis=0) ** 2).sum() - (covariance_CKK**2).sum()) / 2
        self.hidden_CVK *= math.sqrt(PAIRS_SD / math.sqrt(variance))

    def _draw(self, stream: str, number: int) -> Clicks:
        options, random = self.options, _random(self.options.seed, stream, number)
        counts_BN = (1.0 / (1.0 - random.random((_CHUNK, options.dense)))).astype(np.int64) - 1
        additive_B = self.bias + dense_feature(counts_BN, "log1p_clip", 0).astype(np.float64) @ self.dense_N
        ids_BCH = np.empty((_CHUNK, options.columns, options.hots), dtype=np.int32)
        sum_BK, squares_B = np.zeros((_CHUNK, WIDTH)), np.zeros(_CHUNK)
        for column in range(options.columns):
            rank_BH = np.searchsorted(self._below_V, random.random((_CHUNK, options.hots)), side="right")
            ids_BCH[:, column] = self.id_of_rank_CV[column, rank_BH]
            additive_B += self.weight_CV[column, rank_BH].sum(axis=1) / math.sqrt(options.hots)
            vector_BK = self.hidden_CVK[column, rank_BH].sum(axis=1) / math.sqrt(options.hots)
            sum_BK += vector_BK
            squares_B += (vector_BK**2).sum(axis=1)
        logit_B = additive_B + ((sum_BK**2).sum(axis=1) - squares_B) / 2  # Rendle 2010, lemma 3.1
        labels_B = (random.random(_CHUNK) < expit(logit_B)).astype(np.int8)
        return Clicks(labels_B, counts_BN, ids_BCH, additive_B, logit_B)


def write_clicks(options: ClickOptions, folder: Path, source: str = "gr prepare clicks") -> dict[str, Any]:
    """Write the tabular folders folder/train and folder/test, and folder/oracle.json.

    Returns the content of oracle.json. Raises ConfigError where the labels of test/ are all the same.
    """
    stream = ClickStream(options)
    sizes: dict[Part, int] = {"train": options.rows, "test": options.test_rows}
    for part, rows in sizes.items():
        schema = _schema(options, f"clicks-{part}", rows, stated(source, options, f", {part}"))
        names = column_names(schema)
        write_tabular(folder / part, schema, (_table(names, c) for c in stream.chunks(part, 0, rows)), f"clicks {part}")
    return write_oracle(folder, click_oracle(stream))


def click_oracle(stream: ClickStream) -> dict[str, Any]:
    """AUC, NE and log loss of the true probabilities on the labels of test/, which no model exceeds in expectation.

    without_interactions: metrics of the logit without products of pairs, with the slope and bias of smallest log loss.
    It is nearly the best additive model: one fitted to the true probabilities of 400,000 rows of the defaults has NE
    0.949, this 0.952.
    Raises ConfigError where those labels are all the same.
    """
    options, parts = stream.options, []
    for clicks in stream.chunks("test", 0, options.test_rows):
        parts.append((clicks.labels_B, clicks.logit_B, stream.additive_logit(clicks)))
    labels_B, logit_B, additive_B = (np.concatenate(part) for part in zip(*parts, strict=True))
    if labels_B.min() == labels_B.max():
        raise ConfigError(
            f"test_rows={options.test_rows}: all labels of test/ are {labels_B[0]}, so there is no AUC; set test_rows "
            "higher"
        )
    return {
        "options": asdict(options),
        "target": "label of each row of test/",
        "knows": "bias, dense terms, weight and hidden vector of each id; without_interactions all but the hidden ones",
        "base_rate": float(labels_B.mean()),
        **_metrics(logit_B, labels_B),
        "without_interactions": _metrics(additive_B, labels_B),
    }


def _table(names: list[str], clicks: Clicks) -> pa.Table:
    dense_BN = dense_feature(clicks.counts_BN, "log1p_clip", 0)
    return tabular_table(names, clicks.labels_B, dense_BN.T, clicks.ids_BCH.transpose(1, 0, 2))


def _schema(options: ClickOptions, name: str, rows: int, source: str) -> TabularSchema:
    ids = [f"c{number + 1}" for number in range(options.columns)]
    return TabularSchema(
        format_version=FORMAT_VERSION,
        kind="tabular",
        name=name,
        labels=["label"],
        dense=[f"i{number + 1}" for number in range(options.dense)],
        transform=DenseTransform(name="log1p_clip", version=1),
        sparse=[SparseColumn(name=column, cardinality=options.cardinality, hots=options.hots) for column in ids],
        rows=rows,
        threshold=1,
        files=[SourceRows(name=name, rows=rows, minimum=0)],
        source=source,
    )


def _metrics(logit_B: np.ndarray, labels_B: np.ndarray) -> dict[str, float]:
    """AUC, NE and log loss by the definitions of gr.metrics.ranking, which needs torch."""
    _, place_B, count_U = np.unique(logit_B, return_inverse=True, return_counts=True)
    rank_B = (np.cumsum(count_U) - (count_U - 1) / 2)[place_B]
    positives, base_rate = int(labels_B.sum()), float(labels_B.mean())
    beaten = rank_B[labels_B == 1].sum() - positives * (positives + 1) / 2
    log_loss = float(np.mean(np.logaddexp(0.0, logit_B) - labels_B * logit_B))
    entropy = -(base_rate * math.log(base_rate) + (1 - base_rate) * math.log1p(-base_rate))
    auc = float(beaten / (positives * (len(labels_B) - positives)))
    return {"auc": auc, "ne": log_loss / entropy, "log_loss": log_loss}


def _fitted_logit(score_B: np.ndarray, probability_B: np.ndarray, bias: float) -> tuple[float, float]:
    """Slope and bias of the logit linear in the score of smallest expected log loss: Newton's method from (1, bias)."""
    design_B2 = np.stack([score_B, np.ones_like(score_B)], axis=1)
    fit_2 = np.array([1.0, bias])
    for _ in range(20):
        fitted_B = expit(design_B2 @ fit_2)
        curvature_22 = (design_B2.T * (fitted_B * (1 - fitted_B))) @ design_B2
        fit_2 += np.linalg.solve(curvature_22, design_B2.T @ (probability_B - fitted_B))
    return float(fit_2[0]), float(fit_2[1])


def _random(seed: int, stream: str, number: int) -> np.random.Generator:
    return random_stream(seed, number * len(_STREAMS) + _STREAMS.index(stream))

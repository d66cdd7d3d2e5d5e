"""The accuracy gate: does a cheaper form of a model answer as the model does? Paired, two-sided, in numpy alone.

Both forms are asked for the same rows, and every measure is a change with its standard error, taken from the
differences row by row. A measure passes where the whole confidence interval of its change lies within its bounds, fails
where the interval lies wholly outside of them, and otherwise there are too few rows to tell. Bounds are two-sided: of a
model whose probabilities are too far apart, rounding that shrinks its logits lowers the loss, and a gate on increases
alone passes tables that answer otherwise (2-bit rows of a ranker trained on MovieLens-100K: NE -0.6 %).

Measures of a task with labels 0 and 1, over the reference's log loss where they are relative:
  ne          the relative change of the log loss, and so of NE, whose entropy is that of the labels for both.
  auc         the change of the AUC (DeLong et al., Biometrics 1988, for its error).
  divergence  the mean Kullback-Leibler divergence of the candidate's probabilities from the reference's, over the log
              loss: the NE that rounding would cost if the reference were right. It is p (1 - p) / 2 times the square of
              a logit's change, and has no noise of labels, so it shows what the noise of `ne` hides.
A task of numbers has the relative change of its squared error and, as divergence, the mean square of its outputs'
change over that error; a retrieval model the relative changes of HR@10 and NDCG@10.

Rows that share a unit, as the events of a user do, depend on each other, so errors are of sums over units (Liang and
Zeger, Biometrika 1986). N rows, U units, P positive and Q negative rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from gr.errors import ServingError

Verdict = Literal["pass", "fail", "too few rows"]
LEAST_UNITS = 100  # below, an error estimated from differences that are mostly 0 says little


@dataclass(frozen=True)
class Limits:
    """The bounds of the changes, each on both sides.

    ne: relative, of the loss. ranking: relative, of HR@10 and NDCG@10. confidence: of the two-sided intervals.
    """

    ne: float = 0.0005
    ranking: float = 0.01
    confidence: float = 0.95

    @property
    def auc(self) -> float:
        """Absolute: 0.001 by default, which papers on click models call a gain. Where NE moves by its bound, AUC moves
        by about a quarter of this, so it decides only where both forms order alike rows differently.
        """
        return 2 * self.ne

    @property
    def divergence(self) -> float:
        """Relative to the loss: 0.5 % by default. Ten times what NE may change by: rows of 4 bits, whose place is for
        NE to decide, have 0.03 to 0.08 %, rows of 2 bits 0.7 to 1.8 % (docs/benchmarks, serving accuracy). Answers that
        differ so much are those of another model, whatever the labels of some rows make of it.
        """
        return 10 * self.ne

    @property
    def errors(self) -> float:
        """Standard errors from the middle of an interval to its end."""
        return NormalDist().inv_cdf(0.5 + self.confidence / 2)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(_Frozen):
    """One change of one task. change and error are in the unit of bound; reference and candidate the values themselves.

    rows_needed: about how many rows would decide, if the change stays as it is; None where it is decided.
    """

    name: str
    reference: float
    candidate: float
    change: float
    error: float
    bound: float
    verdict: Verdict
    rows_needed: int | None = None


class TaskReport(_Frozen):
    """The gate's measurements of one task.

    mean, mean_square, largest: of the changes of outputs (logits, numbers, the log2 of places), without their signs.
    calibration: mean prediction over mean label, of the reference and of the candidate; None where labels are not of
    both 0 and 1.
    """

    task: str
    rows: int
    units: int
    measures: tuple[Measure, ...]
    mean: float
    mean_square: float
    largest: float
    calibration: tuple[float, float] | None = None

    @property
    def sensitivity(self) -> float:
        """The measure in which independent roundings add up: the divergence, or where there is none the mean square."""
        divergence = [measure.change for measure in self.measures if measure.name == "divergence"]
        return divergence[0] if divergence else self.mean_square


class GateReport(_Frozen):
    """The verdict on a candidate: the worst of its measures'. data: the folder of the rows; data_checksums: CRC-32 of
    its row groups and of its schema.
    """

    verdict: Verdict
    confidence: float
    tasks: tuple[TaskReport, ...]
    rows_needed: int | None = None
    data: str
    data_checksums: dict[str, int | None]

    @classmethod
    def of(
        cls, tasks: Sequence[TaskReport], limits: Limits, *, data: str, data_checksums: dict[str, int | None]
    ) -> "GateReport":
        measures = [measure for task in tasks for measure in task.measures]
        verdict = worst([measure.verdict for measure in measures])
        needed = max((measure.rows_needed or 0 for measure in measures), default=0)
        rows_needed = needed if verdict == "too few rows" else None
        return cls(
            verdict=verdict,
            confidence=limits.confidence,
            tasks=tuple(tasks),
            rows_needed=rows_needed,
            data=data,
            data_checksums=data_checksums,
        )

    def measure(self, name: str) -> Measure:
        """The first task's measure of a name."""
        return next(measure for measure in self.tasks[0].measures if measure.name == name)

    @property
    def sensitivity(self) -> float:
        """The sum of the tasks'."""
        return sum(task.sensitivity for task in self.tasks)

    def reasons(self) -> list[str]:
        """A phrase for each measure that has the verdict; of those that are undecided, the rows needed."""
        return [
            f"{task.task}: {_phrase(measure, task.rows, self.confidence)}"
            for task in self.tasks
            for measure in task.measures
            if measure.verdict == self.verdict
        ]

    def require(self) -> None:
        """Raises ServingError, with the reasons and the remedy, unless the verdict is pass."""
        if self.verdict == "pass":
            return
        reasons = "; ".join(self.reasons())
        if self.verdict == "fail":
            raise ServingError(
                f"the accuracy gate fails: {reasons}: choose dtypes of more bits (tables.dtype=auto), or allow more"
            )
        raise ServingError(
            f"the accuracy gate has too few rows in {self.data}: {reasons}: name more rows, choose dtypes "
            "of more bits, or allow more"
        )


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    order: tuple[Verdict, ...] = ("pass", "too few rows", "fail")
    return max(verdicts, key=order.index)


def binary_task(
    task: str,
    labels_N: np.ndarray,
    reference_N: np.ndarray,
    candidate_N: np.ndarray,
    limits: Limits,
    units_N: np.ndarray | None = None,
) -> TaskReport:
    """The report of a task with labels 0 and 1. reference_N, candidate_N: logits. units_N: the unit of each row, any
    integers; None: each row is one.

    Labels of one class have no NE and no AUC: the change of the log loss stands alone. Raises ServingError for logits
    that are not finite, ValueError for other labels.
    """
    labels, reference, candidate, units = _rows(task, labels_N, reference_N, candidate_N, units_N)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"task {task!r}: labels must be 0 or 1")
    loss, new_loss = log_loss(reference, labels), log_loss(candidate, labels)
    p, base = _probability(reference), labels.mean()
    kl = np.maximum(p * (reference - candidate) + np.logaddexp(0, candidate) - np.logaddexp(0, reference), 0)
    divergence = units.measure("divergence", (0, kl.mean()), units.ratio(kl, loss), limits.divergence, limits)
    change, changed = units.ratio(new_loss - loss, loss), np.abs(candidate - reference)
    if base in (0, 1):
        of_loss = units.measure("log_loss", (loss.mean(), new_loss.mean()), change, limits.ne, limits)
        return _report(task, units, (of_loss, divergence), changed)
    entropy = -base * math.log(base) - (1 - base) * math.log1p(-base)
    (auc, auc_N), (new_auc, new_auc_N) = _auc(labels, reference), _auc(labels, candidate)
    measures = (
        units.measure("ne", (loss.mean() / entropy, new_loss.mean() / entropy), change, limits.ne, limits),
        units.measure("auc", (auc, new_auc), (new_auc - auc, units.error(new_auc_N - auc_N)), limits.auc, limits),
        divergence,
    )
    return _report(task, units, measures, changed, (p.mean() / base, _probability(candidate).mean() / base))


def value_task(
    task: str,
    labels_N: np.ndarray,
    reference_N: np.ndarray,
    candidate_N: np.ndarray,
    limits: Limits,
    units_N: np.ndarray | None = None,
) -> TaskReport:
    """The report of a task whose labels and outputs are numbers. Raises ServingError, as binary_task does."""
    labels, reference, candidate, units = _rows(task, labels_N, reference_N, candidate_N, units_N)
    loss, new_loss, changed = (reference - labels) ** 2, (candidate - labels) ** 2, candidate - reference
    measures = (
        units.measure("mse", (loss.mean(), new_loss.mean()), units.ratio(new_loss - loss, loss), limits.ne, limits),
        units.measure(
            "divergence", (0.0, (changed**2).mean()), units.ratio(changed**2, loss), limits.divergence, limits
        ),
    )
    return _report(task, units, measures, np.abs(changed))


def retrieval_task(
    reference_N: np.ndarray, candidate_N: np.ndarray, limits: Limits, units_N: np.ndarray | None = None
) -> TaskReport:
    """The report of a retrieval model. reference_N, candidate_N: places of held-out items among all, 1 is best."""
    reference, candidate = (np.asarray(each, dtype=np.float64) for each in (reference_N, candidate_N))
    _check_finite("retrieve", reference, candidate)
    units = _Units(len(reference), units_N)
    measures = []
    for name, gain in (("hr@10", np.ones_like), ("ndcg@10", lambda places: 1 / np.log2(1 + places))):
        before, after = (np.where(places <= 10, gain(places), 0.0) for places in (reference, candidate))
        change = units.ratio(after - before, before)
        measures.append(units.measure(name, (before.mean(), after.mean()), change, limits.ranking, limits))
    return _report("retrieve", units, tuple(measures), np.abs(np.log2(candidate) - np.log2(reference)))


def log_loss(logits_N: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """The loss of each row in nats, float64 [N]."""
    return np.logaddexp(0, logits_N) - labels_N * logits_N


class _Units:
    """The rows of a task, by the unit that they belong to."""

    def __init__(self, rows: int, units_N: np.ndarray | None) -> None:
        self.rows = rows
        self._unit_N = None if units_N is None else np.unique(units_N, return_inverse=True)[1].reshape(-1)
        self.count = rows if self._unit_N is None else int(self._unit_N.max(initial=-1)) + 1
        if not rows:
            raise ServingError("the accuracy gate has no rows: name data that was not trained on")

    def error(self, influence_N: np.ndarray) -> float:
        """The standard error of an estimate. influence_N: what each row adds to its deviation; they sum to 0."""
        if self.count < 2:
            return math.inf
        sums_U = influence_N if self._unit_N is None else np.bincount(self._unit_N, weights=influence_N)
        return math.sqrt(self.count / (self.count - 1) * float((sums_U**2).sum()))

    def ratio(self, change_N: np.ndarray, base_N: np.ndarray) -> tuple[float, float]:
        """The sum of changes over the sum of bases, and its standard error by the delta method."""
        base = float(base_N.sum())
        if not base:
            raise ServingError("the accuracy gate divides by a loss or metric of 0: name more rows")
        ratio = float(change_N.sum()) / base
        return ratio, self.error((change_N - ratio * base_N) / base)

    def measure(
        self, name: str, values: tuple[float, float], change: tuple[float, float], bound: float, limits: Limits
    ) -> Measure:
        """values: of the reference and the candidate. change: with its standard error."""
        moved, error = change
        verdict, needed = self._verdict(abs(moved), limits.errors * error, bound)
        reference, candidate = map(float, values)
        return Measure(
            name=name,
            reference=reference,
            candidate=candidate,
            change=float(moved),
            error=float(error),
            bound=bound,
            verdict=verdict,
            rows_needed=needed,
        )

    def _verdict(self, moved: float, reach: float, bound: float) -> tuple[Verdict, int | None]:
        """moved: the size of a change. reach: half the width of its interval."""
        if not moved and not reach:
            return "pass", None  # the two forms answer alike
        if self.count < LEAST_UNITS:
            return "too few rows", math.ceil(self.rows * LEAST_UNITS / self.count)
        if moved + reach <= bound:
            return "pass", None
        if moved - reach > bound:
            return "fail", None
        # A change at the bound itself would take rows without end; one within a hundredth of it is as good as decided.
        gap = max(abs(bound - moved), bound / 100)
        return "too few rows", math.ceil(self.rows * (reach / gap) ** 2)


def _auc(labels_N: np.ndarray, scores_N: np.ndarray) -> tuple[float, np.ndarray]:
    """The share of pairs of a positive and a negative where the positive scores higher, ties counting half; and what
    each row adds to its deviation, float64 [N].
    """
    positive_N = labels_N == 1
    positive_P, negative_Q = np.sort(scores_N[positive_N]), np.sort(scores_N[~positive_N])
    wins_P = _below(negative_Q, scores_N[positive_N])
    wins_Q = 1 - _below(positive_P, scores_N[~positive_N])
    auc = float(wins_P.mean())
    influence_N = np.empty(len(labels_N))
    influence_N[positive_N] = (wins_P - auc) / len(wins_P)
    influence_N[~positive_N] = (wins_Q - auc) / len(wins_Q)
    return auc, influence_N


def _below(sorted_M: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The share of sorted_M below each score; equal ones count half."""
    below, not_above = np.searchsorted(sorted_M, scores, "left"), np.searchsorted(sorted_M, scores, "right")
    return (below + not_above) / (2 * len(sorted_M))


def _probability(logits_N: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits_N))


def _rows(
    task: str, labels_N: np.ndarray, reference_N: np.ndarray, candidate_N: np.ndarray, units_N: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, "_Units"]:
    """Labels and the outputs of both forms in float64, and the units of the rows. Raises ServingError."""
    labels, reference, candidate = (np.asarray(each, dtype=np.float64) for each in (labels_N, reference_N, candidate_N))
    _check_finite(task, reference, candidate)
    return labels, reference, candidate, _Units(len(labels), units_N)


def _check_finite(task: str, reference: np.ndarray, candidate: np.ndarray) -> None:
    for form, outputs in (("the checkpoint", reference), ("the candidate", candidate)):
        if wrong := int((~np.isfinite(outputs)).sum()):
            raise ServingError(
                f"the accuracy gate: {wrong:,} of {len(outputs):,} outputs of {form} for task {task} are not finite: "
                "serve a checkpoint from before the model diverged, or dtypes of a larger range"
            )


def _report(
    task: str,
    units: _Units,
    measures: tuple[Measure, ...],
    changed_N: np.ndarray,
    calibration: tuple[float, float] | None = None,
) -> TaskReport:
    return TaskReport(
        task=task,
        rows=units.rows,
        units=units.count,
        measures=measures,
        mean=float(changed_N.mean()),
        mean_square=float((changed_N**2).mean()),
        largest=float(changed_N.max()),
        calibration=calibration and (float(calibration[0]), float(calibration[1])),
    )


def _phrase(measure: Measure, rows: int, confidence: float) -> str:
    scale, unit = (1, "") if measure.name == "auc" else (100, " %")
    digits = max(2, 2 - math.floor(math.log10(scale * measure.bound)))
    change, reach = scale * measure.change, scale * NormalDist().inv_cdf(0.5 + confidence / 2) * measure.error
    text = f"{measure.name} {change:+.{digits}f} +- {reach:.{digits}f}{unit}, allowed {scale * measure.bound:g}{unit}"
    needed = measure.rows_needed
    return text if needed is None else f"{text}, of {rows:,} rows and about {needed:,} needed"

"""The accuracy gate: its errors against repeated draws, its verdicts on changes that are known. N rows."""

import math

import numpy as np
import pytest

from gr.errors import ServingError
from gr.serving.gate.accuracy_gate import (
    GateReport,
    Limits,
    Measure,
    TaskReport,
    binary_task,
    log_loss,
    retrieval_task,
    value_task,
)

LIMITS = Limits()


def clicks(rows: int, seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Labels and logits of a model that is right (scale 1), or whose logits are too large."""
    random = np.random.default_rng(seed)
    truth_N = random.normal(-1.5, 1.4, rows)
    labels_N = random.random(rows) < 1 / (1 + np.exp(-truth_N))
    return labels_N, scale * truth_N, random


def report(*tasks: TaskReport) -> GateReport:
    return GateReport.of(tasks, LIMITS, data="data/clicks/test", data_checksums={"row_groups": 1, "schema": 2})


def named(task: TaskReport) -> dict[str, Measure]:
    return {measure.name: measure for measure in task.measures}


def test_values_are_those_of_their_definitions() -> None:
    labels_N, logits_N, random = clicks(2_000, 0)
    candidate_N = logits_N + random.normal(0, 0.3, len(logits_N))
    task = binary_task("click", labels_N, logits_N, candidate_N, LIMITS)
    p, q = (1 / (1 + np.exp(-each)) for each in (logits_N, candidate_N))
    losses = [-np.where(labels_N, np.log(each), np.log1p(-each)) for each in (p, q)]
    base = labels_N.mean()
    entropy = -base * math.log(base) - (1 - base) * math.log1p(-base)
    measures = named(task)
    assert measures["ne"].reference == pytest.approx(losses[0].mean() / entropy)
    assert measures["ne"].change == pytest.approx(losses[1].mean() / losses[0].mean() - 1)
    divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert measures["divergence"].change == pytest.approx(divergence / losses[0].mean())
    for logits, value in ((logits_N, measures["auc"].reference), (candidate_N, measures["auc"].candidate)):
        positive, negative = logits[labels_N], logits[~labels_N]
        assert value == pytest.approx((positive[:, None] > negative).mean())
    assert task.calibration == pytest.approx((p.mean() / base, q.mean() / base))
    assert task.largest == np.abs(candidate_N - logits_N).max()
    assert np.allclose(log_loss(logits_N, labels_N), losses[0])


def test_ties_count_half_in_the_auc() -> None:
    labels_N, logits_N, _ = clicks(500, 1)
    coarse_N = logits_N.round()
    task = binary_task("click", labels_N, logits_N, coarse_N, LIMITS)
    positive, negative = coarse_N[labels_N][:, None], coarse_N[~labels_N]
    assert named(task)["auc"].candidate == pytest.approx(
        ((positive > negative) + 0.5 * (positive == negative)).mean(), abs=1e-12
    )


@pytest.mark.parametrize("rows_of_a_unit", [1, 10])
def test_standard_errors_are_those_of_repeated_draws(rows_of_a_unit: int) -> None:
    """Of a unit, rows share what rounding does to them, as the events of a user share its row of a table."""
    changes: dict[str, list[tuple[float, float]]] = {}
    units = np.repeat(np.arange(200), rows_of_a_unit)
    for seed in range(400):
        random = np.random.default_rng(seed)
        taste_N = random.normal(0, 1, 200)[units]
        logits_N = taste_N + random.normal(-1, 1, len(units))
        labels_N = random.random(len(units)) < 1 / (1 + np.exp(-logits_N))
        candidate_N = logits_N + random.normal(0.1, 0.3, 200)[units]
        for measure in binary_task("click", labels_N, logits_N, candidate_N, LIMITS, units).measures:
            changes.setdefault(measure.name, []).append((measure.change, measure.error))
    for name, pairs in changes.items():
        drawn, estimated = np.std([change for change, _ in pairs]), np.mean([error for _, error in pairs])
        assert 0.85 < estimated / drawn < 1.15, name


def test_rows_that_are_their_own_unit_are_as_none_given() -> None:
    labels_N, logits_N, random = clicks(1_000, 2)
    candidate_N = logits_N + random.normal(0, 0.1, len(logits_N))
    own = binary_task("click", labels_N, logits_N, candidate_N, LIMITS, random.permutation(1_000) * 7)
    alone = binary_task("click", labels_N, logits_N, candidate_N, LIMITS)
    for mine, other in zip(own.measures, alone.measures, strict=True):
        assert mine.model_dump() == pytest.approx(other.model_dump())


def test_verdicts_on_20_000_rows() -> None:
    """Noise as rows of 8, 4 and 2 bits make it on gr's clicks: pass, too few rows, fail."""
    labels_N, logits_N, random = clicks(20_000, 3)
    noise_N = random.normal(0, 1, len(logits_N))
    verdicts = [
        report(binary_task("click", labels_N, logits_N, logits_N + size * noise_N, LIMITS))
        for size in (0.0, 0.004, 0.05, 0.35)
    ]
    assert [each.verdict for each in verdicts] == ["pass", "pass", "too few rows", "fail"]
    undecided = verdicts[2]
    assert undecided.rows_needed is not None and 30_000 < undecided.rows_needed < 10_000_000
    with pytest.raises(ServingError, match=rf"too few rows in data/clicks/test: .*about {undecided.rows_needed:,}"):
        undecided.require()
    with pytest.raises(ServingError, match=r"gate fails: click: ne \+.* %, allowed 0.05 %; .*divergence"):
        verdicts[3].require()
    verdicts[0].require()


def test_rows_needed_do_decide() -> None:
    labels_N, logits_N, random = clicks(20_000, 3)
    task = binary_task("click", labels_N, logits_N, logits_N + random.normal(0, 0.05, len(logits_N)), LIMITS)
    ne = named(task)["ne"]
    assert ne.verdict == "too few rows" and ne.rows_needed is not None
    reach = LIMITS.errors * ne.error * math.sqrt(task.rows / ne.rows_needed)
    assert reach <= abs(LIMITS.ne - abs(ne.change)) * (1 + 1e-9)


def test_a_loss_that_falls_is_a_change_too() -> None:
    """A model whose logits are too large: rounding that shrinks them lowers NE, and must not pass for that."""
    labels_N, logits_N, random = clicks(20_000, 4, scale=1.8)
    candidate_N = 0.9 * logits_N + random.normal(0, 0.2, len(logits_N))
    task = binary_task("click", labels_N, logits_N, candidate_N, LIMITS)
    measures = named(task)
    assert measures["ne"].change < -0.01 and measures["ne"].verdict == "fail"
    assert report(task).verdict == "fail"
    # Where gain and loss cancel, NE sees nothing, and the divergence does.
    sizes = np.linspace(0.2, 2.0, 37)
    noise_N = random.normal(0, 1, len(logits_N))
    tasks = [binary_task("click", labels_N, logits_N, 0.9 * logits_N + s * noise_N, LIMITS) for s in sizes]
    balanced = named(min(tasks, key=lambda each: abs(named(each)["ne"].change)))
    assert balanced["ne"].verdict == "too few rows" and balanced["divergence"].verdict == "fail"


def test_few_units_decide_nothing() -> None:
    labels_N, logits_N, random = clicks(5_000, 5)
    candidate_N = logits_N + random.normal(0, 1e-4, len(logits_N))
    units_N = np.arange(5_000) % 50
    gate = report(binary_task("click", labels_N, logits_N, candidate_N, LIMITS, units_N))
    assert gate.verdict == "too few rows" and gate.rows_needed == 10_000
    assert report(binary_task("click", labels_N, logits_N, logits_N, LIMITS, units_N)).verdict == "pass"
    one = binary_task("click", labels_N, logits_N, candidate_N, LIMITS, np.zeros(5_000))
    assert report(one).verdict == "too few rows" and one.units == 1


def test_numbers_are_gated_on_their_squared_error() -> None:
    random = np.random.default_rng(6)
    labels_N = random.normal(0, 1, 20_000)
    outputs_N = labels_N + random.normal(0, 0.5, len(labels_N))
    noise_N = random.normal(0, 1, len(labels_N))
    verdicts = [
        report(value_task("watched", labels_N, outputs_N, outputs_N + size * noise_N, LIMITS))
        for size in (0.0, 0.001, 0.3)
    ]
    assert [each.verdict for each in verdicts] == ["pass", "pass", "fail"]
    assert verdicts[2].measure("mse").change == pytest.approx(0.36, rel=0.1)
    assert verdicts[2].measure("divergence").change == pytest.approx(0.36, rel=0.1)


def test_places_are_gated_on_hits_and_gains() -> None:
    random = np.random.default_rng(7)
    places_N = np.floor(random.pareto(0.5, 100_000)) + 1
    same = retrieval_task(places_N, places_N, LIMITS)
    assert report(same).verdict == "pass" and same.measures[0].reference == (places_N <= 10).mean()
    worse = report(retrieval_task(places_N, 3 * places_N, LIMITS))
    assert worse.verdict == "fail" and worse.measure("ndcg@10").change < -0.3
    one_off_N = np.where(random.random(len(places_N)) < 0.001, places_N + 1, places_N)
    assert report(retrieval_task(places_N, one_off_N, LIMITS)).verdict == "pass"
    with pytest.raises(ServingError, match=r"hr@10 .* %, allowed 1 %"):
        worse.require()


def test_what_cannot_be_measured_is_one_line() -> None:
    labels_N, logits_N, _ = clicks(200, 8)
    bad_N = np.where(np.arange(200) < 3, np.nan, logits_N)
    for task, message in (
        (lambda: binary_task("click", labels_N, logits_N, bad_N, LIMITS), "3 of 200 outputs of the candidate"),
        (lambda: value_task("watched", labels_N, bad_N, logits_N, LIMITS), "3 of 200 outputs of the checkpoint"),
        (lambda: binary_task("click", labels_N[:0], logits_N[:0], logits_N[:0], LIMITS), "has no rows"),
        (lambda: retrieval_task(np.full(9, 50.0), np.full(9, 40.0), LIMITS), "divides by a loss or metric of 0"),
        (lambda: retrieval_task(np.empty(0), np.empty(0), LIMITS), "has no rows"),
    ):
        with pytest.raises(ServingError, match=message):
            task()
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        binary_task("click", np.full(200, 2), logits_N, logits_N, LIMITS)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class_leave_the_loss(label: int) -> None:
    _, logits_N, random = clicks(20_000, 10)
    labels_N = np.full(len(logits_N), label)
    for size, verdict in ((0.001, "pass"), (0.5, "fail")):
        candidate_N = logits_N + random.normal(0, size, len(logits_N))
        gate = report(binary_task("share", labels_N, logits_N, candidate_N, LIMITS))
        assert gate.verdict == verdict and gate.tasks[0].calibration is None
        assert [measure.name for measure in gate.tasks[0].measures] == ["log_loss", "divergence"]


def test_a_report_is_json() -> None:
    labels_N, logits_N, random = clicks(300, 9)
    written = report(binary_task("click", labels_N, logits_N, logits_N + random.normal(0, 0.1, 300), LIMITS))
    assert GateReport.model_validate_json(written.model_dump_json()) == written

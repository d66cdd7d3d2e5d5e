"""Metrics of clicks against their plain definitions, and against themselves at other world sizes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gr.dist import World
from gr.errors import DataError, TrainingError
from gr.metrics.ranking import BINS, LifetimeMetrics, RankingMetrics, _bins, auc_by_group, normalised_entropy
from tests.support.ranks import run_ranks

HERE = World(0, 1, 0, 1, torch.device("cpu"))

# (logit, label, weight, group), with ties: few logits.
Rows = list[tuple[float, int, float, int]]
rows_of_both_classes = st.lists(
    st.tuples(
        st.sampled_from([-3.0, -1.5, -0.0, 0.0, 0.25, 1e-3, 4.0]),
        st.integers(0, 1),
        st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        st.integers(-1, 2),
    ),
    min_size=2,
    max_size=30,
).filter(lambda rows: len({y for _, y, w, _ in rows if w}) == 2 and len({x for x, _, w, _ in rows if w}) > 1)


def columns(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, labels, weights, groups = zip(*rows, strict=True)
    real = {"dtype": torch.float64}
    return torch.tensor(logits, **real), torch.tensor(labels), torch.tensor(weights, **real), torch.tensor(groups)


def compute_tasks(tasks: dict[str, RankingMetrics | LifetimeMetrics]) -> dict[str, float]:
    return {f"{name}/{metric}": value for name, task in tasks.items() for metric, value in task.compute().items()}


def plain_auc(rows: Rows) -> float:
    pairs = [(w * v, x, z) for x, y, w, _ in rows if y for z, t, v, _ in rows if not t]
    total = sum(weight for weight, _, _ in pairs)
    return sum(weight * ((x > z) + 0.5 * (x == z)) for weight, x, z in pairs) / total if total else math.nan


def plain_metrics(rows: Rows) -> dict[str, float]:
    rows = [row for row in rows if row[2]]
    weight = sum(w for _, _, w, _ in rows)
    base_rate = sum(w * y for _, y, w, _ in rows) / weight
    chance = [1 / (1 + math.exp(-x)) for x, *_ in rows]
    loss = -sum(w * math.log(p if y else 1 - p) for p, (_, y, w, _) in zip(chance, rows, strict=True)) / weight
    entropy = -base_rate * math.log(base_rate) - (1 - base_rate) * math.log(1 - base_rate)
    return {
        "ne": loss / entropy,
        "log_loss": loss,
        "accuracy": sum(w * ((x >= 0) == y) for x, y, w, _ in rows) / weight,
        "base_rate": base_rate,
        "calibration": sum(w * p for p, (_, _, w, _) in zip(chance, rows, strict=True)) / weight / base_rate,
        "examples": len(rows),
        "auc": plain_auc(rows),
    }


def plain_gauc(rows: Rows) -> tuple[float, int, int]:
    each = [[row for row in rows if row[3] == group and row[2]] for group in sorted({g for *_, g in rows})]
    each = [group for group in each if group]
    scored = [group for group in each if not math.isnan(plain_auc(group))]
    weights = [sum(w for _, _, w, _ in group) for group in scored]
    mean = sum(w * plain_auc(group) for w, group in zip(weights, scored, strict=True)) / sum(weights) if scored else 0
    return mean, len(scored), len(each) - len(scored)


def exact(rows: Rows, **options) -> RankingMetrics:
    metrics = RankingMetrics("click", HERE, **options)
    logits, labels, weights, groups = columns(rows)
    for part in (slice(0, 1), slice(1, 1), slice(1, None)):
        metrics.update(logits[part], labels[part], weights[part], groups[part] if options.get("grouped") else None)
    return metrics


class TestAgainstPlainStatements:
    @given(rows_of_both_classes)
    def test_exact(self, rows: Rows) -> None:
        assert exact(rows).compute() == pytest.approx(plain_metrics(rows), rel=1e-12)

    @given(rows_of_both_classes)
    def test_groups(self, rows: Rows) -> None:
        gauc, groups, skipped = plain_gauc(rows)
        metrics = exact(rows, grouped=True)
        values = metrics.compute()
        assert (values["gauc_groups"], values["gauc_groups_skipped"]) == (groups, skipped)
        assert ("gauc" in values) == bool(groups)
        assert not groups or values["gauc"] == pytest.approx(gauc, rel=1e-12)
        assert {name: values[name] for name in plain_metrics(rows)} == pytest.approx(plain_metrics(rows), rel=1e-12)

    @settings(max_examples=25)
    @given(rows_of_both_classes)
    def test_lifetime(self, rows: Rows) -> None:
        metrics = LifetimeMetrics("click", HERE)
        logits, labels, weights, _ = columns(rows)
        for part in (slice(0, 1), slice(1, 1), slice(1, None)):
            metrics.update(logits[part], labels[part], weights[part])
        values, expected = metrics.compute(), plain_metrics(rows)
        assert values.pop("auc_error") >= abs(values["auc"] - expected["auc"]) - 1e-12
        assert values == pytest.approx(expected, rel=1e-12)  # logits far enough apart for bins of their own

    def test_probabilities_are_logits_in_another_form(self) -> None:
        rows = [(-3.5, 0, 1.0, 0), (-1.0, 1, 2.0, 0), (0.5, 0, 0.5, 0), (2.0, 1, 1.0, 0)]
        logits, labels, weights, _ = columns(rows)
        for metrics in (
            RankingMetrics("click", HERE, predictions="probabilities"),
            LifetimeMetrics("click", HERE, predictions="probabilities"),
        ):
            metrics.update(logits.double().sigmoid(), labels.bool(), weights)
            values = metrics.compute()
            values.pop("auc_error", None)
            assert values == pytest.approx(plain_metrics(rows), rel=1e-12)


class TestKnownValues:
    def test_who_predicts_the_base_rate_has_ne_1(self) -> None:
        assert normalised_entropy(-math.log(0.5), 0.5) == 1.0
        base_rate = 0.25
        metrics = RankingMetrics("click", HERE, predictions="probabilities")
        # Two predictions that differ by next to nothing: one alone would be an error.
        metrics.update(torch.tensor([0.25, 0.25, 0.25, 0.25 + 1e-12], dtype=torch.float64), torch.tensor([0, 1, 0, 0]))
        values = metrics.compute()
        assert values["ne"] == pytest.approx(1.0, abs=1e-11) and values["calibration"] == pytest.approx(1.0, abs=1e-11)
        assert (values["accuracy"], values["base_rate"]) == (0.75, base_rate)

    @pytest.mark.parametrize(("logits", "auc"), [([-2, -1, 1, 2], 1.0), ([2, 1, -1, -2], 0.0), ([1, 1, 1, 2], 0.75)])
    def test_auc_by_hand(self, logits: list[float], auc: float) -> None:
        metrics = RankingMetrics("click", HERE)
        metrics.update(torch.tensor(logits), torch.tensor([0, 0, 1, 1]))
        assert metrics.compute()["auc"] == auc

    def test_a_weight_is_a_count(self) -> None:
        rows = [(1.0, 1, 2.0, 0), (0.5, 0, 1.0, 0), (2.0, 0, 3.0, 0), (-1.0, 1, 1.0, 0)]
        repeated = [(x, y, 1.0, g) for x, y, w, g in rows for _ in range(int(w))]
        weighted, counted = exact(rows).compute(), exact(repeated).compute()
        assert (weighted.pop("examples"), counted.pop("examples")) == (4, 7)
        assert weighted == pytest.approx(counted, rel=1e-12)

    def test_groups_by_hand(self) -> None:
        """AUC 1 of 2 impressions, 0.25 of 4, and a group without a click."""
        auc_G, weight_G = auc_by_group(
            torch.tensor([1, 2, 5, 4, 3, 5, 9.0]),
            torch.tensor([0, 1, 0, 0, 1, 1, 0]),
            torch.ones(7),
            torch.tensor([7, 7, 8, 8, 8, 8, 9]),
        )
        assert auc_G[:2].tolist() == [1.0, 1.5 / 4] and auc_G[2].isnan() and weight_G.tolist() == [2, 4, 1]

    def test_sums_that_do_not_round_alike_give_a_group_of_one_class_no_auc(self) -> None:
        """((.1 + .1) + .2) + .7 is not (.1 + .1) + (.2 + .7): negatives of earlier groups are summed both ways."""
        weights = torch.tensor([0.1, 0.1, 0.2, 0.7, 1.0], dtype=torch.float64)
        labels, groups = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 2])
        assert auc_by_group(torch.arange(5.0), labels, weights, groups)[0].isnan().all()

    def test_large_logits_keep_their_loss(self) -> None:
        metrics = RankingMetrics("click", HERE)
        metrics.update(torch.tensor([500.0, -500.0, 25.0]), torch.tensor([0, 1, 1]))
        expected = (1000 + math.log1p(math.exp(-25))) / 3
        assert metrics.compute()["log_loss"] == pytest.approx(expected, rel=1e-15)


class TestBins:
    @pytest.mark.slow
    @given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=50))
    def test_order_is_kept(self, logits: list[float]) -> None:
        values = torch.tensor(sorted(logits), dtype=torch.float64)
        bins = _bins(values)
        assert (bins.diff() >= 0).all() and 0 <= int(bins[0]) and int(bins[-1]) < BINS
        assert torch.equal(_bins(torch.tensor([0.0])), _bins(torch.tensor([-0.0])))

    def test_the_error_of_auc_is_bounded_and_small(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(20000, generator=generator) * 1.3 - 3.4
        labels = (torch.rand(20000, generator=generator) < logits.sigmoid()).int()
        once, always = RankingMetrics("click", HERE), LifetimeMetrics("click", HERE)
        for metrics in (once, always):
            for part in range(0, 20000, 1000):
                metrics.update(logits[part : part + 1000], labels[part : part + 1000])
        expected, values = once.compute(), always.compute()
        assert 0 < values["auc_error"] < 2e-4
        assert abs(values.pop("auc") - expected.pop("auc")) <= values.pop("auc_error")
        assert values == pytest.approx(expected, rel=1e-12)


class TestWindow:
    def test_whole_updates_that_hold_enough(self) -> None:
        rows = [(i / 10, i % 3 == 0, 1.0, 0) for i in range(30)]
        logits, labels, weights, _ = columns(rows)
        metrics = RankingMetrics("click", HERE, window=7)
        for first in range(0, 30, 3):
            metrics.update(logits[first : first + 3], labels[first : first + 3], weights[first : first + 3])
            if first >= 3:
                newest = rows[max(0, first - 6) : first + 3]  # 9 examples: three updates
                assert metrics.compute() == pytest.approx(plain_metrics(newest), rel=1e-12)
        assert len(metrics._parts) == 3

    def test_memory_is_bounded_without_compute(self) -> None:
        metrics = RankingMetrics("click", HERE, window=10)
        for _ in range(50):
            metrics.update(torch.randn(4), torch.zeros(4))
        assert len(metrics._parts) == 3

    def test_a_window_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="at least 1 example, is 0"):
            RankingMetrics("click", HERE, window=0)


# How 8 updates of 6 examples are split over ranks: the whole batch on one rank, even, uneven with an idle rank.
def shares(world: World) -> slice:
    bounds = {1: [0, 6], 2: [0, 2, 6], 4: [0, 3, 3, 4, 6]}[world.size]
    return slice(bounds[world.rank], bounds[world.rank + 1])


def measure(world: World, rows: Rows) -> dict[str, float]:
    tasks = {
        "click": RankingMetrics("click", world, grouped=True),
        "click/window": RankingMetrics("click", world, window=13),
        "click/lifetime": LifetimeMetrics("click", world),
    }
    for update in range(8):
        part = columns(rows[update * 6 : update * 6 + 6])
        logits, labels, weights, groups = (column[shares(world)] for column in part)
        tasks["click"].update(logits, labels, weights, groups)
        tasks["click/window"].update(logits, labels, weights)
        tasks["click/lifetime"].update(logits, labels, weights)
    return compute_tasks(tasks)


def random_rows(count: int) -> Rows:
    random = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        logit = round(random.normal(), 1)
        label = int(logit + random.normal() > 0)
        rows.append((logit, label, float(random.choice([0, 0.5, 1, 3])), int(random.integers(0, 5))))
    return rows


class TestWorldSizes:
    @pytest.mark.parametrize("size", [2, 4])
    def test_the_same_on_every_rank_and_at_every_size(self, size: int) -> None:
        rows = random_rows(48)
        alone = measure(HERE, rows)
        assert {name: alone[f"click/window/{name}"] for name in plain_metrics(rows)} == pytest.approx(
            plain_metrics(rows[-18:]), rel=1e-12
        )
        for values in run_ranks(measure, size, rows):
            assert values == pytest.approx(alone, rel=1e-12)

    def test_one_rank_without_an_update(self) -> None:
        for values in run_ranks(_only_rank_0, 2):
            assert (values["auc"], values["examples"]) == (1.0, 2)

    def test_ranks_that_each_predict_one_value(self) -> None:
        for values in run_ranks(_one_value_a_rank, 2):
            assert [values[f"{first}/{name}"] for first in (0, 1) for name in ("auc", "base_rate")] == [1.0, 0.5] * 2

    def test_all_ranks_raise_alike(self) -> None:
        for values in run_ranks(_faults, 2):
            assert values == [
                "TrainingError: task 'click': 1 of 4 predictions are not finite logits: the model has diverged; lower "
                "its learning rate, or look for inputs that are not finite",
                "ValueError: ranks updated [1, 2] times: with a window all ranks must update equally often",
            ]


def _only_rank_0(world: World) -> dict[str, float]:
    metrics = RankingMetrics("click", world)
    if world.rank == 0:
        metrics.update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    return metrics.compute()


def _one_value_a_rank(world: World) -> dict[str, float]:
    tasks = {str(first): LifetimeMetrics("click", world) for first in (0, 1)}
    for first, metrics in tasks.items():
        label = int(world.rank == int(first))
        metrics.update(torch.full((3,), float(label)), torch.full((3,), label))
    return compute_tasks(tasks)


def _faults(world: World) -> list[str]:
    faults = []
    diverged = RankingMetrics("click", world)
    diverged.update(torch.tensor([1.0, math.nan if world.rank else 0.0]), torch.tensor([0, 1]))
    unequal = RankingMetrics("click", world, window=5)
    for _ in range(1 + world.rank):
        unequal.update(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    for metrics in (diverged, unequal):
        try:
            metrics.compute()
        except (TrainingError, ValueError) as error:
            faults.append(f"{type(error).__name__}: {error}")
    return faults


@pytest.fixture(params=[RankingMetrics, LifetimeMetrics])
def kind(request: pytest.FixtureRequest) -> type:
    return request.param


class TestErrors:
    @pytest.mark.parametrize(
        ("logits", "labels", "weights", "error", "message"),
        [
            ([], [], None, DataError, "task 'click': no example of weight above 0"),
            ([1, 2], [0, 1], [0, 0], DataError, "no example of weight above 0"),
            ([1, 2, 3], [0, 0, 0], None, DataError, "all 3 labels are 0, so there is no NE, AUC or calibration"),
            ([1, 2, 3], [1, 1, 0], [1, 1, 0], DataError, "all 2 labels are 1"),
            ([1, 2], [0, 2], None, DataError, "1 of 2 labels are neither 0 nor 1"),
            ([1, 2, 3], [0, 1, math.nan], None, DataError, "1 of 3 labels"),
            ([1, 2], [0, 1], [1, -1], DataError, "1 of 2 weights are negative or not finite"),
            ([1, 2], [0, 1], [1, math.nan], DataError, "1 of 2 weights"),
            ([math.nan, math.inf, 3], [0, 1, 0], None, TrainingError, "2 of 3 predictions are not finite logits"),
            ([0.5, 0.5, 0.5], [0, 1, 0], None, TrainingError, r"all predictions are the same \(logit 0.5\)"),
            ([0.5, 0.5, 9], [0, 1, 0], [1, 1, 0], TrainingError, "all predictions are the same"),
        ],
    )
    def test_values(self, kind, logits, labels, weights, error, message) -> None:
        metrics = kind("click", HERE)
        given_weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        metrics.update(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), given_weights)
        with pytest.raises(error, match=message):
            metrics.compute()

    @pytest.mark.parametrize("value", [0.0, 1.0, 1.5, -0.5, math.nan])
    def test_what_is_no_probability(self, kind, value: float) -> None:
        metrics = kind("click", HERE, predictions="probabilities")
        metrics.update(torch.tensor([0.5, value]), torch.tensor([0, 1]))
        with pytest.raises(TrainingError, match="1 of 2 predictions are not strictly between 0 and 1"):
            metrics.compute()

    def test_examples_of_weight_0_may_hold_anything(self, kind) -> None:
        metrics = kind("click", HERE)
        weights = torch.tensor([1.0, 1.0, 0.0])
        metrics.update(torch.tensor([1.0, 2.0, math.nan]), torch.tensor([0, 1, -7]), weights)
        values = metrics.compute()
        assert (values["auc"], values["examples"]) == (1.0, 2)

    def test_shapes(self, kind) -> None:
        with pytest.raises(ValueError, match=r"vectors of one length, found shapes \(2,\), \(3,\)"):
            kind("click", HERE).update(torch.zeros(2), torch.zeros(3))
        with pytest.raises(ValueError, match=r"found shapes \(2, 1\)"):
            kind("click", HERE).update(torch.zeros(2, 1), torch.zeros(2, 1))

    @pytest.mark.parametrize("grouped", [False, True])
    def test_groups_as_announced(self, grouped: bool) -> None:
        groups = None if grouped else torch.zeros(2, dtype=torch.int64)
        with pytest.raises(ValueError, match="groups must be given if, and only if, grouped=True"):
            RankingMetrics("click", HERE, grouped=grouped).update(torch.zeros(2), torch.zeros(2), None, groups)

    def test_groups_that_are_no_ids(self) -> None:
        with pytest.raises(ValueError, match=r"groups must be integers, are torch\.float32"):
            RankingMetrics("click", HERE, grouped=True).update(torch.zeros(2), torch.zeros(2), None, torch.zeros(2))


def test_tasks_have_metrics_of_their_own() -> None:
    tasks = {"click": RankingMetrics("click", HERE), "like": LifetimeMetrics("like", HERE)}
    tasks["click"].update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    tasks["like"].update(torch.tensor([1.0, 2.0]), torch.tensor([1, 0]))
    values = compute_tasks(tasks)
    assert (values["click/auc"], values["like/auc"], values["like/auc_error"]) == (1.0, 0.0, 0.0)


def test_the_model_keeps_its_graph_and_its_predictions() -> None:
    logits = torch.tensor([1.0, 2.0], requires_grad=True)
    metrics = RankingMetrics("click", HERE)
    metrics.update(logits, torch.tensor([0, 1]))
    logits.data.zero_()
    assert not metrics._parts[0].logits_B.requires_grad and metrics.compute()["auc"] == 1.0

"""The relaxation on options small enough to solve by hand. test_solve.py holds the bound against every placement."""

from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

from gr.config.inventory import SHARDING_TYPES
from gr.planner.bound import TOLERANCE, Relaxation
from gr.planner.candidates import Capacity, Options, Scope

TABLE_WISE, COLUMN_WISE, ROW_WISE = (SHARDING_TYPES.index(name) for name in ("table_wise", "column_wise", "row_wise"))
# table, sharding type, shards, seconds of a shard, bytes of a shard
Row = tuple[int, int, int, float, float]


def options_of(rows: list[Row], group_seconds: dict[int, float] | None = None) -> Options:
    table, kind, shards, seconds, bytes_ = (np.array(column) for column in zip(*rows, strict=True))
    none, zero = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    latencies = np.zeros(len(SHARDING_TYPES))
    for index, latency in (group_seconds or {}).items():
        latencies[index] = latency
    return Options(
        table_O=table,
        sharding_type_O=kind,
        kernel_O=zero,
        column_width_O=zero,
        shards_O=shards,
        scope_O=np.full(len(rows), int(Scope.RANK)),
        seconds_O=seconds.astype(float),
        hbm_O=bytes_.astype(float),
        host_O=none,
        total_seconds_O=shards * seconds.astype(float),
        total_hbm_O=shards * bytes_.astype(float),
        extra_seconds_O=none,
        extra_hbm_O=none,
        extra_shard_O=zero,
        group_seconds_S=latencies,
    )


def relaxation(rows: list[Row], hbm: float, *, ranks: int = 2, latencies: dict[int, float] | None = None) -> Relaxation:
    return Relaxation(options_of(rows, latencies), Capacity(ranks, ranks, hbm, 0.0))


# Fast and large, or slow and small.
CHOICE: list[Row] = [(0, TABLE_WISE, 1, 2.0, 100.0), (0, TABLE_WISE, 1, 6.0, 20.0)]
CHOICES = CHOICE + [(1, kind, shards, seconds, bytes_) for _, kind, shards, seconds, bytes_ in CHOICE]


def with_scopes(options: Options, scopes: list[Scope]) -> Options:
    return replace(options, scope_O=np.array(scopes, dtype=int))


class TestWhatEveryRankHas:
    """Table 0 is on both ranks, so table 1 comes on top of it, and may be cut to keep the sum low."""

    ROWS: ClassVar[list[Row]] = [
        (0, ROW_WISE, 2, 3.0, 1.0),
        (1, TABLE_WISE, 1, 2.0, 1.0),
        (1, COLUMN_WISE, 2, 1.5, 1.0),
    ]

    def bound(self, rows: list[Row]) -> float | None:
        options = with_scopes(options_of(rows), [Scope.ALL if row[1] == ROW_WISE else Scope.RANK for row in rows])
        return Relaxation(options, Capacity(2, 2, 100.0, 0.0)).bound(np.full(len(rows), True), 0.0)

    def test_a_shard_lies_on_top(self):
        """The mean is (6 + 2) / 2 = 4."""
        assert self.bound(self.ROWS[:2]) == pytest.approx(5.0, rel=2 * TOLERANCE)

    def test_unless_a_finer_cut_avoids_it(self):
        assert self.bound(self.ROWS) == pytest.approx(4.5, rel=2 * TOLERANCE)

    def test_a_table_that_need_not_be_everywhere_counts_for_none(self):
        """Alone on a rank, table 0 leaves the other one to table 1."""
        rows: list[Row] = [(0, ROW_WISE, 2, 3.0, 1.0), (0, TABLE_WISE, 1, 4.0, 1.0), (1, TABLE_WISE, 1, 2.0, 1.0)]
        assert self.bound(rows) == pytest.approx(4.0, rel=2 * TOLERANCE)

    def test_the_last_rows_may_be_fewer(self):
        """Two shards of 3 seconds that take 5 in all: a rank has 2 of them at least."""
        options = with_scopes(options_of(self.ROWS[:2]), [Scope.ALL, Scope.RANK])
        options = replace(options, total_seconds_O=np.array([5.0, 2.0]))
        bound = Relaxation(options, Capacity(2, 2, 100.0, 0.0)).bound(np.full(2, True), 0.0)
        assert bound == pytest.approx(4.0, rel=2 * TOLERANCE)


class TestRelaxed:
    def test_with_room_for_all_the_mean_of_the_cheapest(self):
        relaxed = relaxation(CHOICES, 100.0).solve(np.full(4, True))
        assert relaxed is not None
        assert relaxed.option_T.tolist() == [0, 2] and relaxed.price == 0 and relaxed.seconds == 2.0

    def test_with_too_little_a_mix_at_the_price_of_a_byte(self):
        """160 bytes hold half of each kind: 4 seconds saved an 80 bytes make 0.05 a byte."""
        relaxed = relaxation(CHOICES, 60.0).solve(np.full(4, True))
        assert relaxed is not None
        assert relaxed.price == pytest.approx(0.05, rel=1e-3)
        # 200 bytes wanted, 120 there: the 80 that lack cost 4 seconds, over two ranks.
        assert relaxed.seconds == pytest.approx((4.0 + 4.0) / 2, rel=1e-3)
        assert relaxed.option_T.tolist() == [1, 3]  # what fits

    def test_a_share_of_the_memory(self):
        problem = relaxation(CHOICES, 100.0)
        half = problem.solve(np.full(4, True), share=0.6)
        assert half is not None and half.seconds == pytest.approx(4.0, rel=1e-3)

    def test_more_than_all_memory_is_needed(self):
        assert relaxation(CHOICES, 19.0).solve(np.full(4, True)) is None
        assert relaxation(CHOICES, 20.0).solve(np.full(4, True)) is not None

    def test_a_table_without_an_option(self):
        usable = np.array([True, True, False, False])
        assert relaxation(CHOICES, 100.0).solve(usable) is None
        assert relaxation(CHOICES, 100.0).bound(usable, 0.0) is None

    def test_the_first_of_equal_options_is_taken(self):
        rows = [CHOICE[0], CHOICE[0]]
        choice = relaxation(rows, 100.0).cheapest(np.full(2, True), 0.0)
        assert choice is not None and choice[0].tolist() == [0] and choice[1] == 2.0


class TestBound:
    def test_no_shard_is_dearer_than_the_whole(self):
        """On 4 ranks the mean is 2, but one shard takes 8."""
        problem = relaxation([(0, TABLE_WISE, 1, 8.0, 1.0)], 10.0, ranks=4)
        assert problem.bound(np.array([True]), 0.0) == pytest.approx(8.0, rel=2 * TOLERANCE)

    def test_the_cheaper_of_a_large_shard_and_many_small(self):
        rows = [(0, TABLE_WISE, 1, 8.0, 1.0), (0, COLUMN_WISE, 4, 3.0, 1.0)]
        problem = relaxation(rows, 10.0, ranks=4)
        assert problem.bound(np.full(2, True), 0.0) == pytest.approx(3.0, rel=2 * TOLERANCE)

    def test_latency_is_part_of_it(self):
        problem = relaxation([(0, TABLE_WISE, 1, 8.0, 1.0)], 10.0, ranks=4)
        assert problem.bound(np.array([True]), 5.0) == pytest.approx(13.0, rel=2 * TOLERANCE)

    def test_it_rises_as_memory_shrinks(self):
        bounds = [relaxation(CHOICES, hbm).bound(np.full(4, True), 0.0) for hbm in (100.0, 80.0, 60.0, 40.0, 20.0)]
        for more, less in pairwise(bounds):
            assert more is not None and less is not None and less >= more * (1 - 2 * TOLERANCE)


class TestGroups:
    ROWS: tuple[Row, ...] = (
        (0, TABLE_WISE, 1, 4.0, 1.0),
        (0, ROW_WISE, 2, 1.0, 1.0),
        (1, TABLE_WISE, 1, 4.0, 1.0),
        (1, ROW_WISE, 2, 1.0, 1.0),
    )

    def test_a_type_is_worth_its_latency_or_not(self):
        cheap = relaxation(list(self.ROWS), 10.0, latencies={TABLE_WISE: 0.1, ROW_WISE: 0.1}).groups
        assert cheap[0].bound == pytest.approx(2.1, rel=2 * TOLERANCE)
        assert cheap[0].usable_O.tolist() == [False, True, False, True]
        dear = relaxation(list(self.ROWS), 10.0, latencies={TABLE_WISE: 0.1, ROW_WISE: 9.0}).groups
        assert dear[0].bound == pytest.approx(4.1, rel=2 * TOLERANCE)
        assert dear[0].usable_O.tolist() == [True, False, True, False]

    def test_the_best_come_first(self):
        bounds = [g.bound for g in relaxation(list(self.ROWS), 10.0, latencies={TABLE_WISE: 0.1, ROW_WISE: 0.3}).groups]
        assert len(bounds) >= 2 and bounds == sorted(bounds)

    def test_types_without_latency_are_in_every_group(self):
        groups = relaxation(list(self.ROWS), 10.0, latencies={TABLE_WISE: 0.1}).groups
        assert all(group.usable_O[[1, 3]].all() for group in groups)

    def test_options_larger_than_a_rank_are_in_none(self):
        rows: list[Row] = [(0, TABLE_WISE, 1, 1.0, 30.0), (0, ROW_WISE, 2, 2.0, 10.0)]
        groups = relaxation(rows, 20.0).groups
        assert groups and not any(group.usable_O[0] for group in groups)

    def test_none_where_nothing_fits(self):
        assert relaxation(list(self.ROWS), 0.5).groups == []

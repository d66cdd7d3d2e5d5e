"""The solver and its bound against every placement of tiny problems."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.config.inventory import SEQUENCE_TYPES, SHARDING_TYPES, InventoryConfig, TableConfig
from gr.planner import solve as solve_module
from gr.planner.bound import Relaxation
from gr.planner.candidates import Capacity, Options, Scope, Solution
from gr.planner.enumerate import search_space
from gr.planner.solve import DoesNotFit, solve, solve_balanced
from tests.support.plans import machine

MOST = 300_000  # placements of all tables together
MACHINES = [(1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (4, 2)]  # ranks, ranks per host
FEW, ALL = 40, 200  # seeds


@dataclass(frozen=True)
class Problem:
    options: Options
    capacity: Capacity


def loads(problem: Problem, option: int, ranks: np.ndarray) -> np.ndarray:
    """Seconds, bytes of HBM and bytes on the host that an option puts on every rank: 3 x R."""
    options, capacity = problem.options, problem.capacity
    odd = int(options.extra_shard_O[option])
    group = slice(odd, None if options.scope_O[option] == Scope.HOST else odd + 1, capacity.ranks_per_host)
    load = np.zeros((3, capacity.ranks))
    load[0, ranks], load[1, ranks] = options.seconds_O[option], options.hbm_O[option]
    load[0, ranks[group]] += options.extra_seconds_O[option]
    load[1, ranks[group]] += options.extra_hbm_O[option]
    load[2, ranks] = options.host_O[option]
    return load


def places(problem: Problem, option: int) -> Iterator[np.ndarray]:
    """Every way to put the shards of an option on ranks, up to the order of equal ones."""
    options, capacity = problem.options, problem.capacity
    count, local = int(options.shards_O[option]), capacity.ranks_per_host
    odd = count - 1 if options.extra_seconds_O[option] else None
    hosts = np.arange(capacity.ranks).reshape(-1, local)
    match Scope(int(options.scope_O[option])):
        case Scope.ALL:
            choices: list[tuple[int, ...]] = [tuple(range(capacity.ranks))]
        case Scope.HOST:
            choices = [tuple(hosts[list(some)].ravel()) for some in combinations(range(len(hosts)), count // local)]
        case Scope.RANK:
            choices = list(_orders(range(capacity.ranks), count, odd))
        case Scope.HOST_RANKS:
            choices = [order for host in hosts for order in _orders(host.tolist(), count, odd)]
    for ranks in choices:
        if options.allowed_TR is None or options.allowed_TR[options.table_O[option], list(ranks)].all():
            yield np.array(ranks)


def _orders(ranks: range | list[int], count: int, odd: int | None) -> Iterator[tuple[int, ...]]:
    """Ranks of `count` shards of which the last is unlike the others, unless all are alike."""
    for some in combinations(ranks, count):
        for last in range(count) if odd is not None else [count - 1]:
            yield (*some[:last], *some[last + 1 :], some[last])


def best_cost(problem: Problem) -> float | None:
    """The least cost of a rank over all placements that fit; None where none does."""
    options, capacity = problem.options, problem.capacity
    sums, used = np.zeros((1, 3, capacity.ranks)), np.zeros(1, dtype=int)
    for table in range(options.tables):
        ways = [
            (loads(problem, option, ranks), 1 << options.sharding_type_O[option])
            for option in np.flatnonzero(options.table_O == table).tolist()
            for ranks in places(problem, option)
        ]
        if len(sums) * len(ways) > MOST:
            raise ValueError("too many placements to try them all")
        if not ways:
            return None
        sums = (sums[:, None] + np.array([load for load, _ in ways])).reshape(-1, 3, capacity.ranks)
        used = (used[:, None] | np.array([types for _, types in ways])).ravel()
        fits = (sums[:, 1] <= capacity.hbm_bytes).all(axis=1) & (sums[:, 2] <= capacity.host_bytes).all(axis=1)
        sums, used = sums[fits], used[fits]
    if not len(sums):
        return None
    latencies = sum(((used >> index) & 1) * seconds for index, seconds in enumerate(options.group_seconds_S))
    return float((sums[:, 0].max(axis=1) + latencies).min())


def summed(problem: Problem, solution: Solution) -> np.ndarray:
    pairs = zip(solution.option_T.tolist(), solution.ranks_T, strict=True)
    return np.sum([loads(problem, option, ranks) for option, ranks in pairs], axis=0)


def cost(problem: Problem, solution: Solution) -> float:
    used = np.unique(problem.options.sharding_type_O[solution.option_T])
    return float(summed(problem, solution)[0].max() + problem.options.group_seconds_S[used].sum())


def tiny(seed: int) -> Problem:
    """1 to 3 tables of any kind on 1 to 4 ranks, with much memory or about as little as they need."""
    random = np.random.default_rng(seed)

    def one_of(*values):
        return values[int(random.integers(len(values)))]

    def table(name: str) -> TableConfig:
        kind = one_of("pooled", "sequence")
        exist = SEQUENCE_TYPES if kind == "sequence" else SHARDING_TYPES
        types = [exist[i] for i in random.choice(len(exist), int(random.integers(2, 5)), replace=False)]
        return TableConfig(
            name=name,
            rows=one_of(1, 3, 7, 100, 50_000, 10**6),
            dim=one_of(8, 16, 20),
            kind=kind,
            ids_per_example=one_of(0.3, 1.0, 5.0, 50.0),
            skew=one_of(0.0, 0.5, 1.05, 2.0),
            optimizer=one_of("adam", "rowwise_adagrad", "sgd"),
            sharding_types=tuple(types) if set(types) != {"grid_shard", "table_column_wise"} else ("table_wise",),
            kernels=one_of(("fused",), ("fused", "fused_uvm")),
        )

    tables = tuple(table(f"t{i}") for i in range(one_of(1, 2, 2, 3)))
    ranks, local = one_of(*MACHINES)
    topology = replace(
        machine(ranks, local, "cuda"), intra_latency=one_of(0.0, 1e-6, 1e-5), inter_latency=one_of(1e-6, 1e-4)
    )
    options = search_space(InventoryConfig(rank_batch_size=one_of(1, 8, 512), tables=tables), topology)
    smallest = sum(options.total_hbm_O[options.table_O == index].min() for index in range(len(tables)))
    spare = one_of(1.0, 1.1, 1.5, 3.0, 1e9)
    return Problem(options, Capacity(ranks, local, smallest * spare / ranks + 1, 1e10))


def solved(problem: Problem) -> Solution | None:
    try:
        return solve(problem.options, problem.capacity)
    except DoesNotFit:
        return None


@cache
def outcome(seed: int) -> tuple[float | None, Problem, Solution | None]:
    """(best cost, problem, solution) of a seed."""
    problem = tiny(seed)
    return best_cost(problem), problem, solved(problem)


def outcomes(seeds: int) -> list[tuple[float | None, Problem, Solution | None]]:
    return [outcome(seed) for seed in range(seeds)]


@pytest.mark.parametrize("seeds", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
class TestAgainstEveryPlacement:
    """Every placement of tiny problems is tried. The full run of ALL problems is marked slow."""

    def test_most_solutions_are_the_best_and_none_is_far(self, seeds):
        ratios = np.array([cost(p, s) / best for best, p, s in outcomes(seeds) if best is not None and s is not None])
        assert len(ratios) > seeds / 2
        assert ratios.min() >= 1 - 1e-9
        assert np.quantile(ratios, 0.9) <= 1.01
        assert np.quantile(ratios, 0.95) <= 1.1
        assert ratios.max() <= 1.5

    def test_every_bound_is_below_the_best(self, seeds):
        for best, problem, solution in outcomes(seeds):
            if best is not None:
                bound = Relaxation(problem.options, problem.capacity).groups[0].bound
                assert bound <= best * (1 + 1e-9)
                assert solution is None or solution.bound_seconds == bound

    def test_what_is_solved_can_be_and_little_that_can_be_is_not(self, seeds):
        """Packing may miss the few placements there are where memory is just enough."""
        possible = [solution for best, _, solution in outcomes(seeds) if best is not None]
        assert all(solution is None for best, _, solution in outcomes(seeds) if best is None)
        assert sum(solution is None for solution in possible) <= 0.03 * len(possible)

    def test_no_memory_is_exceeded(self, seeds):
        for _, problem, solution in outcomes(seeds):
            if solution is not None:
                _, hbm, host = summed(problem, solution)
                assert (hbm <= problem.capacity.hbm_bytes * (1 + 1e-12)).all()
                assert (host <= problem.capacity.host_bytes).all()


@given(st.integers(0, 10**9))
@settings(max_examples=20)
def test_the_bound_is_below_the_best_for_any_problem(seed):
    problem = tiny(seed)
    best, groups = best_cost(problem), Relaxation(problem.options, problem.capacity).groups
    assert best is None or groups[0].bound <= best * (1 + 1e-9)


class TestSolve:
    def test_equal_problems_have_equal_solutions(self):
        for seed in range(20):
            first, second = solved(tiny(seed)), solved(tiny(seed))
            if first is None or second is None:
                assert first is second
                continue
            assert first.option_T.tolist() == second.option_T.tolist()
            assert [ranks.tolist() for ranks in first.ranks_T] == [ranks.tolist() for ranks in second.ranks_T]
            assert first.bound_seconds == second.bound_seconds

    def test_tables_larger_than_all_memory(self):
        problem = self.alike(4, hbm_bytes=190.0)
        with pytest.raises(DoesNotFit, match="the tables"):
            solve(problem.options, problem.capacity)

    def test_tables_that_fill_the_memory(self):
        problem = self.alike(4, hbm_bytes=200.0)
        solution = solve(problem.options, problem.capacity)
        assert summed(problem, solution)[1].tolist() == [200.0, 200.0]

    def test_equal_tables_are_spread_evenly(self):
        problem = self.alike(4, hbm_bytes=400.0)
        solution = solve(problem.options, problem.capacity)
        assert summed(problem, solution)[0].tolist() == [2.0, 2.0]
        assert solution.bound_seconds == pytest.approx(2.0, rel=1e-3)

    def test_ranks_of_a_table_are_kept(self):
        allowed = np.array([[True, False]] * 3)
        problem = self.alike(3, hbm_bytes=400.0)
        solution = solve(replace(problem.options, allowed_TR=allowed), problem.capacity)
        assert summed(problem, solution)[0].tolist() == [3.0, 0.0]

    def test_a_balanced_plan_is_kept_where_packing_with_all_memory_finds_none(self, monkeypatch):
        problem, packed = self.alike(3, hbm_bytes=10_000.0), solve_module._solve

        def astray(relaxation: Relaxation) -> Solution:
            if relaxation.capacity.hbm_bytes == problem.capacity.hbm_bytes:
                raise DoesNotFit("astray")
            # Dearer than the bound by more than balance is worth.
            return replace(packed(relaxation), cost=10.0)

        monkeypatch.setattr(solve_module, "_solve", astray)
        assert solve_balanced(problem.options, problem.capacity).cost == 10.0

    @staticmethod
    def alike(tables: int, hbm_bytes: float) -> Problem:
        """Tables of one table-wise option, 1 second and 100 bytes each, on two ranks."""
        ones, none = np.ones(tables), np.zeros(tables)
        options = Options(
            table_O=np.arange(tables),
            sharding_type_O=np.full(tables, SHARDING_TYPES.index("table_wise")),
            kernel_O=np.ones(tables, dtype=int),
            column_width_O=np.zeros(tables, dtype=int),
            shards_O=np.ones(tables, dtype=int),
            scope_O=np.full(tables, int(Scope.RANK)),
            seconds_O=ones,
            hbm_O=100 * ones,
            host_O=none,
            total_seconds_O=ones,
            total_hbm_O=100 * ones,
            extra_seconds_O=none,
            extra_hbm_O=none,
            extra_shard_O=np.zeros(tables, dtype=int),
            group_seconds_S=np.zeros(len(SHARDING_TYPES)),
        )
        return Problem(options, Capacity(2, 2, hbm_bytes, 0.0))


def test_the_integer_program_keeps_to_memory_exactly():
    """HiGHS keeps to its constraints within a tolerance."""
    ones, zeros = np.ones(6), np.zeros(6, dtype=int)
    options = Options(
        table_O=np.repeat(np.arange(3), 2),
        sharding_type_O=zeros + 1,
        kernel_O=zeros + 1,
        column_width_O=zeros,
        shards_O=zeros + 1,
        scope_O=zeros,
        seconds_O=np.tile([1.0, 2.0], 3),
        hbm_O=np.tile([1e9, 1.0], 3),
        host_O=0 * ones,
        total_seconds_O=np.tile([1.0, 2.0], 3),
        total_hbm_O=np.tile([1e9, 1.0], 3),
        extra_seconds_O=0 * ones,
        extra_hbm_O=0 * ones,
        extra_shard_O=zeros,
        group_seconds_S=np.zeros(7),
    )
    solution = solve(options, Capacity(1, 1, 3e9 * (1 - 1e-7), 0.0))
    assert options.hbm_O[solution.option_T].sum() <= 3e9 * (1 - 1e-7)

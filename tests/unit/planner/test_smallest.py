"""The search for the smallest number of ranks against a scan that plans every number, from 1 up."""

from dataclasses import replace

import numpy as np
import pytest

from gr.config.inventory import InventoryConfig, TableConfig, sharding_types_of
from gr.errors import PlanError
from gr.planner import smallest as module
from gr.planner.enumerate import search_space
from gr.planner.memory_bound import MemoryBound
from gr.planner.plan import search, table_capacity
from gr.planner.smallest import ROUNDING, in_steps, legal_ranks, smallest
from gr.planner.topology import Topology, parse_topology, with_ranks
from tests.support.plans import machine

MOST = 40  # ranks, in place of MOST_RANKS
FEW, MANY, ALL = 12, 24, 200  # seeds


def drawn(seed: int) -> tuple[InventoryConfig, Topology]:
    """1 to 4 tables of any kind, and hardware with about the memory that they need on some number of ranks."""
    random = np.random.default_rng(seed)

    def one_of(*values):
        return values[int(random.integers(len(values)))]

    def table(name: str) -> TableConfig:
        kind, pooling = one_of("pooled", "sequence"), one_of("sum", "mean")
        exist = sharding_types_of(kind, pooling)
        some = tuple(exist[i] for i in random.choice(len(exist), int(random.integers(1, 4)), replace=False))
        return TableConfig(
            name=name,
            rows=one_of(1, 30, 20_000, 10**6, 3 * 10**7),
            dim=one_of(8, 20, 64, 128),
            dtype=one_of("fp32", "fp16"),
            kind=kind,
            pooling=pooling,
            ids_per_example=one_of(0.3, 1.0, 20.0),
            ids_per_step=one_of(0.0, 0.0, 500.0),
            skew=one_of(0.0, 1.05),
            optimizer=one_of("adam", "rowwise_adagrad", "sgd"),
            sharding_types=one_of(None, None, some),
            kernels=one_of(("fused",), ("fused",), ("fused", "fused_uvm"), ("fused_uvm_caching",)),
            min_shards=one_of(1, 1, 1, 2),
            max_shards=one_of(None, None, 16),
            ranks=one_of(*[None] * 7, (0, 1)),
        )

    batch = one_of("rank_batch_size", "global_batch_size")
    inventory = InventoryConfig(
        **{batch: one_of(16, 500, 20_000) * (1 if batch == "rank_batch_size" else 8)},
        tables=tuple(table(f"t{i}") for i in range(int(random.integers(1, 5)))),
        index_dedup=one_of(False, True),
    )
    topology = machine(1, 1, one_of("cuda", "cpu"))
    topology = replace(topology, ranks_per_host=one_of(1, 2, 4, 8), host_bytes=one_of(10**8, 10**11))
    at = int(random.integers(1, 24))
    hbm, _ = MemoryBound(inventory, replace(topology, ranks_per_host=1)).least(np.array([at]))
    hbm = float(hbm[0]) if np.isfinite(hbm[0]) else 1e9
    fixed = 10**10 - table_capacity(inventory, with_ranks(replace(topology, ranks_per_host=1), at)).hbm_bytes
    return inventory, replace(topology, hbm_bytes=int(fixed + one_of(0.6, 1.0, 1.02, 1.2) * hbm) + 1)


def scanned(inventory: InventoryConfig, topology: Topology) -> int | None:
    """The first legal number of ranks for which a plan is found, without any bound."""
    for ranks in legal_ranks(topology).tolist():
        try:
            search(inventory, with_ranks(topology, ranks))
        except PlanError:
            continue
        return ranks
    return None


@pytest.fixture
def up_to_forty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RANKS", MOST)


@pytest.mark.usefixtures("up_to_forty")
class TestAgainstAScan:
    @pytest.mark.parametrize("seed", range(FEW))
    def test_the_smallest_is_the_first_that_fits(self, seed):
        inventory, topology = drawn(seed)
        first, found = scanned(inventory, topology), smallest(inventory, topology)
        assert found.ranks == first
        assert (first is None) == bool(found.reason)

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [MANY, pytest.param(ALL, marks=pytest.mark.full)])
    def test_of_many_problems(self, count):
        """Some fit on one rank, most on more, some nowhere."""
        problems = [drawn(seed) for seed in range(count)]
        firsts = [scanned(*problem) for problem in problems]
        assert [smallest(*problem).ranks for problem in problems] == firsts
        assert None in firsts and 1 in firsts
        assert sum(first is not None and first > 1 for first in firsts) > count / 3


@pytest.mark.parametrize("seed", range(FEW))
def test_no_plan_is_below_the_bound(seed):
    """The bound against the sums over every option."""
    inventory, topology = drawn(seed)
    local = topology.ranks_per_host
    ranks_N = np.array([1, *(hosts * local for hosts in (1, 2, 3, 5, 8, 40))])
    hbm_N, host_N = MemoryBound(inventory, topology).least(ranks_N)
    for ranks, hbm, host in zip(ranks_N.tolist(), hbm_N, host_N, strict=True):
        try:
            options = search_space(inventory, with_ranks(topology, ranks))
        except PlanError:
            continue
        shard_T = options.minimum_T(options.hbm_O + np.maximum(options.extra_hbm_O, 0))
        assert hbm <= max(options.minimum_T(options.total_hbm_O).sum() / ranks, shard_T.max()) * ROUNDING
        assert host <= options.minimum_T(options.host_O).max() * ROUNDING


BIG = tuple(
    TableConfig(name=name, rows=rows, dim=128, ids_per_example=ids)
    for name, rows, ids in (("user", 3 * 10**9, 1.0), ("item", 5 * 10**8, 100.0), ("city", 10**4, 1.0))
)


class TestFittingIsNotMonotone:
    """With rank_batch_size the rank that owns a table receives the ids of all ranks."""

    @pytest.mark.parametrize("batch", [4096, 16384])
    def test_the_smallest_fit_is_found_below_numbers_that_do_not(self, batch):
        inventory, topology = InventoryConfig(rank_batch_size=batch, tables=BIG), parse_topology("h100")
        assert smallest(inventory, topology).ranks == 24
        use_N = MemoryBound(inventory, topology).use(np.array([16, 24, 65536]))
        assert use_N[0] > 1 > use_N[1]
        assert (use_N[2] > 1) == (batch == 16384)

    def test_nothing_fits_is_said_with_the_number_that_comes_closest(self):
        tables = (TableConfig(name="a", rows=10**9, dim=128, sharding_types=("table_wise",)),)
        found = smallest(InventoryConfig(rank_batch_size=8, tables=tables), parse_topology("h100"))
        assert found.ranks is None
        assert found.reason.startswith(
            "nothing up to 65,536 ranks fits: each of the 8,199 numbers of ranks has less memory than any plan takes; "
            "closest to a fit is 1, where the tables take at least 516 GB of 77.9 GB"
        )


def test_only_divisors_of_the_batch_are_legal():
    assert legal_ranks(parse_topology("h100"), 24).tolist() == [1, 2, 3, 4, 6, 8, 24]
    assert legal_ranks(parse_topology("h100")).tolist()[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24]


def test_steps_grow_after_the_first():
    taken = list(in_steps(range(1, 1000)))
    assert taken[:66] == [*range(1, 65), 72, 81] and taken[-1] >= 1000 / module.STEP

"""The replay of a plan's step: collectives by hand, and the planner's step where nobody is late."""

import numpy as np
import pytest

from benchmarks.simulate import Lengths, all_to_all, reduce_scatter, replay, work_of
from gr.planner.estimate import estimate
from gr.planner.estimate_tables import MESSAGE_SECONDS
from gr.planner.inventory import load_inventory
from gr.planner.plan import search
from gr.planner.topology import parse_topology
from tests.support.plans import machine

EVEN = np.full(4, 0.25)  # of machines with 1 GB/s on every link, and a latency of 10 microseconds


def test_an_all_to_all_takes_the_bytes_that_cross_and_a_message_each() -> None:
    """Each rank sends 1 MB, a quarter to each of the others."""
    done_R = all_to_all(np.zeros(4), np.full(4, 1e6), EVEN, machine(4, 4))
    assert done_R == pytest.approx(np.full(4, 1e-5 + 3 * (MESSAGE_SECONDS + 0.25e-3)))


def test_links_to_other_hosts_are_used_beside_those_within() -> None:
    """Half of it goes to the other host; who sends to whom in which round costs up to a message more."""
    done_R = all_to_all(np.zeros(4), np.full(4, 1e6), EVEN, machine(4, 2))
    least = 1e-5 + 2 * (MESSAGE_SECONDS + 0.25e-3)
    assert done_R.min() == pytest.approx(least) and done_R.max() <= least + MESSAGE_SECONDS + 0.25e-3 + 1e-12


def test_a_late_rank_is_waited_for_by_those_that_take_from_it() -> None:
    ready_R = np.array([0.0, 0.0, 0.0, 1.0])
    assert all_to_all(ready_R, np.full(4, 1e6), EVEN, machine(4, 2)).min() > 1
    assert all_to_all(ready_R, np.zeros(4), EVEN, machine(4, 4)).min() > 1
    assert (all_to_all(np.zeros(1), np.ones(1), np.ones(1), machine(1)) == 0).all()


def test_a_ring_adds_up() -> None:
    done_R = reduce_scatter(np.zeros(4), 4e6, machine(4, 4))
    assert done_R == pytest.approx(np.full(4, 1e-5 + 3 * (MESSAGE_SECONDS + 1e-3)))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [64, 512])
def test_equal_ranks_take_the_planner_s_step_and_unequal_ones_more(ranks: int) -> None:
    estimated = estimate(search(load_inventory("configs/scale/hstu-1.5t.yaml"), parse_topology(f"h100x{ranks}")))
    work = work_of(estimated)
    equal, waits = replay(work, Lengths())
    assert equal == pytest.approx(estimated.step_seconds, rel=0.02) and waits < 0.1
    late, _ = replay(work, Lengths(0.6))
    dealt, _ = replay(work, Lengths(0.6, balanced=True))
    assert late > 1.3 * equal and equal < dealt < 1.15 * equal

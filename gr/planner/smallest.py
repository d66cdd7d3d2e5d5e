"""The smallest number of ranks that a model fits: every number is planned, or excluded by a bound on its memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gr.config.inventory import InventoryConfig
from gr.errors import PlanError
from gr.planner.dense_strategies import strategies, with_layers_again
from gr.planner.estimate import estimate
from gr.planner.memory_bound import MemoryBound
from gr.planner.plan import search
from gr.planner.topology import Topology, with_ranks
from gr.units import size

MOST_RANKS = 1 << 16
ONE_BY_ONE, STEP = 64, 1.125  # after so many failures the numbers that are tried grow by this factor
AT_ONCE = 1 << 16  # numbers of ranks times tables that are bounded at once
ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Trial:
    """One number of ranks: whether a plan was found, and the fullest rank under it, or what was missing."""

    ranks: int
    fits: bool
    limit: str


@dataclass(frozen=True)
class Smallest:
    """The outcome: None ranks where no fit was found. trials: the numbers planned, and the largest excluded one below.

    reason: why there is none, or that smaller numbers were not tried; empty where `ranks` is proved to be the smallest.
    """

    ranks: int | None
    trials: list[Trial]
    reason: str


def legal_ranks(topology: Topology, divides: int = 0) -> np.ndarray:
    """Every number of ranks up to MOST_RANKS that divides `divides` (0: any): parts of one host, then whole hosts."""
    local = topology.ranks_per_host
    ranks_N = np.array([*range(1, local), *range(local, MOST_RANKS + 1, local)])
    return ranks_N[divides % ranks_N == 0]


def smallest(inventory: InventoryConfig, topology: Topology, divides: int = 0) -> Smallest:
    """The smallest number of ranks on the hardware of `topology` for which search() finds a plan.

    Nothing is taken to be monotone: see memory_bound.py. divides: as for legal_ranks.
    """
    legal_N = legal_ranks(topology, divides)
    legal_N = legal_N[inventory.dense_lies_on(legal_N)]
    excluded: list[tuple[float, int]] = []
    tried: list[Trial] = []
    for ranks in in_steps(_not_excluded(inventory, topology, legal_N, excluded)):
        tried.append(trial(inventory, with_ranks(topology, ranks)))
        if tried[-1].fits:
            break
    if tried and tried[-1].fits:
        fit = tried[-1].ranks
        below = [trial(inventory, with_ranks(topology, max(ranks for _, ranks in excluded)))] if excluded else []
        skipped = int(np.searchsorted(legal_N, fit)) + 1 - len(excluded) - len(tried)
        untried = f"{skipped:,} smaller numbers of ranks, which memory does not exclude, were not tried"
        return Smallest(fit, sorted([*below, *tried], key=lambda one: one.ranks), untried if skipped else "")
    if tried:
        skipped = len(legal_N) - len(excluded) - len(tried)
        untried = f", and {skipped:,} more were not tried" if skipped else ""
        reason = (
            f"no fit was found up to {MOST_RANKS:,} ranks: memory excludes {len(excluded):,} numbers of ranks, on "
            f"{len(tried):,} others, {tried[0].ranks:,} to {tried[-1].ranks:,}, no plan was found{untried}"
        )
        return Smallest(None, tried, reason)
    closest = trial(inventory, with_ranks(topology, min(excluded)[1]))
    reason = (
        f"nothing up to {MOST_RANKS:,} ranks fits: each of the {len(excluded):,} numbers of ranks has less memory than "
        f"any plan takes; closest to a fit is {closest.ranks:,}, where {closest.limit}"
    )
    return Smallest(None, [closest], reason)


def smallest_by_strategy(
    inventory: InventoryConfig, topology: Topology, divides: int = 0
) -> list[tuple[InventoryConfig, int | None]]:
    """The smallest number of ranks under each strategy of the dense part, its own first; None where nothing fits.

    Layers are computed again only if that takes fewer ranks.
    """
    outcomes = []
    for strategy in strategies(inventory, topology):
        each = [(tried, smallest(tried, topology, divides).ranks) for tried in with_layers_again(strategy)]
        outcomes.append(min(each, key=lambda outcome: outcome[1] or MOST_RANKS + 1))
    return outcomes


def in_steps(numbers: Iterable[int]) -> Iterator[int]:
    """Ascending `numbers`: ONE_BY_ONE of them, then in growing steps, for a search that ends with its first success."""
    following = 0.0
    for taken, number in enumerate(n for n in numbers if n >= following):
        yield number
        following = number * STEP if taken + 1 >= ONE_BY_ONE else 0.0


def trial(inventory: InventoryConfig, topology: Topology) -> Trial:
    try:
        estimated = estimate(search(inventory, topology))
    except PlanError as error:  # a constraint may exclude every option on a part of a host
        return Trial(topology.ranks, False, str(error))
    used = float(estimated.total_memory_R.max())
    return Trial(topology.ranks, estimated.fits, f"the fullest rank holds {size(used)} of {size(topology.hbm_bytes)}")


def _not_excluded(
    inventory: InventoryConfig, topology: Topology, legal_N: np.ndarray, excluded: list[tuple[float, int]]
) -> Iterator[int]:
    """The numbers of ranks whose memory may suffice; adds the others to `excluded`, as (share of the memory, ranks)."""
    bound, chunk = MemoryBound(inventory, topology), max(1, AT_ONCE // max(1, len(inventory.tables)))
    for start in range(0, len(legal_N), chunk):
        ranks_N = legal_N[start : start + chunk]
        for ranks, use in zip(ranks_N.tolist(), bound.use(ranks_N).tolist(), strict=True):
            if use <= ROUNDING:
                yield ranks
            else:
                excluded.append((use, ranks))

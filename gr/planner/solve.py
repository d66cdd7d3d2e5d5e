"""The solver: an option for every table and ranks for its shards, minimising the costliest rank within memory.

The bound (bound.py) says which sharding types can hold the best solution and how good it can be. Packing (pack.py)
under a target cost either succeeds or fails, so the lowest target is approached by halving the distance to the bound.
"""

from dataclasses import replace

from gr.errors import PlanError
from gr.planner.bound import FAR_OFF, Group, Relaxation
from gr.planner.candidates import Capacity, Options, Solution
from gr.planner.pack import Choices, Packing, Targets
from gr.units import size

CLOSE = 1.001  # ratio to the bound at which the search ends
FIRST_TARGETS = (1.005, 1.04, 1.1, 1.3, 1.8, 3.0, 6.0, 20.0)
HALVINGS = 3
ROUNDS = 150  # rounds of ruin and recreate for a target
SMALL = 20_000  # options times ranks, up to which the integer program is tried
EVEN = 1.5  # ratio of largest to mean table memory that is aimed at where it costs nothing
SLACK = 1 + 1e-9  # factor on the cost, for rounding
# Ratio of largest to mean table memory that is kept to where it costs no more than this share.
BALANCE, GIVEN_UP = 3.0, 0.02
NO_WAY = "no way was found to place the tables within the memory"


class DoesNotFit(PlanError):
    """The tables do not fit the memory, or no way to place them was found."""


def solve_balanced(options: Options, capacity: Capacity) -> Solution:
    """The solution of solve(), with no rank above BALANCE times the mean memory where that costs at most GIVEN_UP."""
    relaxation = _relaxation(options, capacity)
    best = relaxation.groups[0]
    relaxed = relaxation.solve(best.usable_O)
    assert relaxed is not None, "the group has a bound"
    mean = options.total_hbm_O[relaxed.option_T].sum() / capacity.ranks
    balanced: Solution | None = None
    if BALANCE * mean < capacity.hbm_bytes:
        try:
            balanced = solve(options, replace(capacity, hbm_bytes=BALANCE * mean))
        except DoesNotFit:
            balanced = None  # the smallest shard of a table is above the cap
        if balanced is not None and balanced.cost <= (1 + GIVEN_UP) * best.bound:
            return replace(balanced, bound_seconds=best.bound)
    try:
        free = _solve(relaxation)
    except DoesNotFit:  # packing is no proof: more room may lead it astray
        if balanced is None:
            raise
        return replace(balanced, bound_seconds=best.bound)
    if balanced is not None and balanced.cost <= (1 + GIVEN_UP) * free.cost:
        return replace(balanced, bound_seconds=free.bound_seconds)
    return free


def solve(options: Options, capacity: Capacity) -> Solution:
    """The best solution of the search and a bound on all. Raises DoesNotFit. Equal inputs give equal solutions."""
    return _solve(_relaxation(options, capacity))


def _relaxation(options: Options, capacity: Capacity) -> Relaxation:
    relaxation = Relaxation(options, capacity)
    if not relaxation.groups:
        raise DoesNotFit(too_large(options, capacity) or NO_WAY)
    return relaxation


def _solve(relaxation: Relaxation) -> Solution:
    options, capacity = relaxation.options, relaxation.capacity
    bound = relaxation.groups[0].bound
    small = len(options.table_O) * capacity.ranks < SMALL
    best: tuple[float, Packing] | None = None
    for group in relaxation.groups:
        # A large problem takes the first set of types that packs well: the bounds of the others are close to its cost.
        if best is not None and (group.bound >= best[0] or (not small and best[0] <= FAR_OFF * bound)):
            break
        choices = Choices(options, group.usable_O, capacity.ranks_per_host)
        first = _first(relaxation, group, choices)
        if first is None:
            continue
        packing = _refined(relaxation, group, choices, first)
        if small and packing.cost + group.latency > CLOSE * bound:
            from gr.planner.exact import improved  # scipy.optimize costs 0.3 s, which large problems can do without

            packing = improved(packing, choices)
        if best is None or packing.cost + group.latency < best[0]:
            best = (packing.cost + group.latency, packing)
    if best is None:
        raise DoesNotFit(NO_WAY)
    return Solution(best[1].option_T, best[1].ranks_T, best[0], bound)


def too_large(options: Options, capacity: Capacity) -> str | None:
    """The reason why no solution can fit, by sums of the smallest shards; None where they do not exclude one."""
    total = options.minimum_T(options.total_hbm_O).sum()
    shard = options.minimum_T(options.hbm_O).max()
    host = options.minimum_T(options.host_O).max()
    if host > capacity.host_bytes:
        return (
            f"the largest shard offloaded to the host takes at least {size(host)} there, and a rank has "
            f"{size(capacity.host_bytes)} of host memory"
        )
    if total <= capacity.hbm_bytes * capacity.ranks and shard <= capacity.hbm_bytes:
        return None
    return (
        f"the tables take at least {size(total)} of {size(capacity.hbm_bytes * capacity.ranks)}, and "
        f"the largest shard at least {size(shard)} of {size(capacity.hbm_bytes)} on a rank"
    )


def _refined(relaxation: Relaxation, group: Group, choices: Choices, best: Packing) -> Packing:
    """The best packing with the options of `group`: lowest cost first, then balanced memory at that cost."""
    capacity, bound = relaxation.capacity, group.bound - group.latency
    low = bound
    for _ in range(HALVINGS):
        if best.cost <= CLOSE * bound or best.cost <= CLOSE * low:
            break
        target = Targets((low + best.cost) / 2, capacity.hbm_bytes)
        packing = _filled(relaxation, group, choices, target)
        if packing is None:
            low = target.seconds
            continue
        packing.improve(target, ROUNDS)
        best = packing if packing.cost < best.cost else best
        low = low if packing.cost <= target.seconds else target.seconds
    balanced = Targets(best.cost * SLACK, min(EVEN * best.hbm_R.mean(), capacity.hbm_bytes))
    best.improve(balanced, ROUNDS // 2)
    return best


def _first(relaxation: Relaxation, group: Group, choices: Choices) -> Packing | None:
    """A packing by best fit under rising targets, up to the first that holds; None where memory suffices for none."""
    best: Packing | None = None
    bound = group.bound - group.latency
    for factor in FIRST_TARGETS:
        target = Targets(factor * bound, relaxation.capacity.hbm_bytes)
        packing = _filled(relaxation, group, choices, target)
        if packing is not None and (best is None or packing.cost < best.cost):
            best = packing
        if best is not None and best.cost <= target.seconds:
            break
    return best


def _filled(relaxation: Relaxation, group: Group, choices: Choices, targets: Targets) -> Packing | None:
    usable_O = relaxation.below(group.usable_O, targets.seconds)
    relaxed = relaxation.solve(usable_O) or relaxation.solve(group.usable_O)
    assert relaxed is not None, "the group has a bound"
    packing = Packing(relaxation.capacity, choices)
    return packing if packing.fill(targets, relaxed.option_T) else None

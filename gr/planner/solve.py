"""The solver: an option for every table and a rank for every shard, least cost of the costliest rank, within memory.

The bound (bound.py) says which sharding types can hold the best solution and how good it can be. Packing (pack.py)
under a target cost either succeeds or not, so the least target is found by halving the distance to the bound.
"""

from dataclasses import replace

from gr.errors import PlanError
from gr.planner.bound import FAR_OFF, Group, Relaxation
from gr.planner.candidates import Capacity, Options, Solution
from gr.planner.pack import Choices, Packing, Targets

CLOSE = 1.001  # to the bound: nothing better is looked for
FIRST_TARGETS = (1.005, 1.04, 1.1, 1.3, 1.8, 3.0, 6.0, 20.0)
HALVINGS = 3
ROUNDS = 150  # of ruin and recreate, for a target
SMALL = 20_000  # options times ranks, up to which the integer program is tried
EVEN = 1.5  # largest to mean memory of the tables that is aimed at, at no cost
SLACK = 1 + 1e-9  # of the cost, for rounding
BALANCE, GIVEN_UP = 3.0, 0.02  # largest to mean memory that is held to, where it costs no more than this share


NO_WAY = "no way was found to place the tables within the memory"


class DoesNotFit(PlanError):
    """The tables do not fit the memory, or no way to place them was found."""


def solve_balanced(options: Options, capacity: Capacity) -> Solution:
    """As solve, with no rank above BALANCE of the mean memory where that costs at most GIVEN_UP."""
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
            balanced = None  # a table whose least shard is above it
        if balanced is not None and balanced.cost <= (1 + GIVEN_UP) * best.bound:
            return replace(balanced, bound_seconds=best.bound)
    free = _solve(relaxation)
    if balanced is not None and balanced.cost <= (1 + GIVEN_UP) * free.cost:
        return replace(balanced, bound_seconds=free.bound_seconds)
    return free


def solve(options: Options, capacity: Capacity) -> Solution:
    """The best solution found and a bound on all. Raises DoesNotFit. Equal inputs give equal solutions."""
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
        # Large problems take the first set of types that packs well: the others' bounds are close to its cost.
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
    """Why no solution can fit, as far as sums of the least shards tell; None where they do not exclude one."""
    total = options.least_T(options.total_hbm_O).sum()
    shard = options.least_T(options.hbm_O).max()
    host = options.least_T(options.host_O).max()
    if host > capacity.host_bytes:
        return (
            f"the largest shard offloaded to the host takes at least {host / 1e9:,.1f} GB there, and a rank has "
            f"{capacity.host_bytes / 1e9:,.1f} GB of host memory"
        )
    if total <= capacity.hbm_bytes * capacity.ranks and shard <= capacity.hbm_bytes:
        return None
    return (
        f"the tables take at least {total / 1e9:,.1f} GB of {capacity.hbm_bytes * capacity.ranks / 1e9:,.1f} GB, and "
        f"the largest shard at least {shard / 1e9:,.1f} GB of {capacity.hbm_bytes / 1e9:,.1f} GB on a rank"
    )


def _refined(relaxation: Relaxation, group: Group, choices: Choices, best: Packing) -> Packing:
    """The best packing found with the options of `group`: of least cost, then of balanced memory at that cost."""
    capacity, least = relaxation.capacity, group.bound - group.latency
    low = least
    for _ in range(HALVINGS):
        if best.cost <= CLOSE * least or best.cost <= CLOSE * low:
            break
        target = Targets((low + best.cost) / 2, capacity.hbm_bytes)
        found = _filled(relaxation, group, choices, target)
        if found is None:
            low = target.seconds
            continue
        found.improve(target, ROUNDS)
        best = found if found.cost < best.cost else best
        low = low if found.cost <= target.seconds else target.seconds
    balanced = Targets(best.cost * SLACK, min(EVEN * best.hbm_R.mean(), capacity.hbm_bytes))
    best.improve(balanced, ROUNDS // 2)
    return best


def _first(relaxation: Relaxation, group: Group, choices: Choices) -> Packing | None:
    """Best fit under rising targets, until one holds."""
    best: Packing | None = None
    least = group.bound - group.latency
    for factor in FIRST_TARGETS:
        target = Targets(factor * least, relaxation.capacity.hbm_bytes)
        found = _filled(relaxation, group, choices, target)
        if found is not None and (best is None or found.cost < best.cost):
            best = found
        if best is not None and best.cost <= target.seconds:
            break
    return best


def _filled(relaxation: Relaxation, group: Group, choices: Choices, targets: Targets) -> Packing | None:
    usable_O = group.usable_O & (relaxation.shard_seconds_O <= targets.seconds)
    relaxed = relaxation.solve(usable_O) or relaxation.solve(group.usable_O)
    assert relaxed is not None, "the group has a bound"
    packing = Packing(relaxation.capacity, choices)
    return packing if packing.fill(targets, relaxed.option_T) else None

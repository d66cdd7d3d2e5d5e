"""Small problems as a mixed-integer linear program, solved by HiGHS.

The variables are the cost, whether a table takes an option, and whether an option has a shard on a rank or on the ranks
of a host. A program of more than VARIABLES is not tried: packing (pack.py) is close there, and much faster.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from gr.planner.candidates import Capacity, Scope
from gr.planner.pack import Choices, Focused, Option, Packing

VARIABLES = 1200
NODES = 100  # nodes of the branching tree: a limit in work, not in time, so that equal inputs give equal plans
GAP = 1e-3


def improved(packing: Packing, choices: Choices) -> Packing:
    """A cheaper packing of the options that `packing` tried, where the program is small and finds one; or `packing`."""
    capacity = packing.capacity
    options = [
        (table, option)
        for table, every in enumerate(choices.every_T)
        for option in Focused(every, packing.cost).all
        if option.scope is not Scope.HOST_RANKS
    ]
    if len({table for table, _ in options}) < len(choices.every_T):
        return packing
    places = [place for pair in enumerate(options) for place in _places(*pair, capacity)]
    count = 1 + len(options) + len(places)
    if count > VARIABLES:
        return packing
    upper = np.ones(count)
    for variable, place in enumerate(places, start=1 + len(options)):
        table = options[place.option][0]
        if choices.allowed_TR is not None and not choices.allowed_TR[table, place.ranks].all():
            upper[variable] = 0.0
    result = milp(
        np.arange(count) == 0,
        constraints=[*_choice(options, places, count), *_loads(len(options), places, packing, count)],
        integrality=(np.arange(count) > 0).astype(int),
        bounds=Bounds(0.0, upper),
        options={"node_limit": NODES, "mip_rel_gap": GAP},
    )
    if result.x is None:
        return packing
    solution = _packing(result.x, options, places, Packing(capacity, choices))
    # HiGHS keeps to memory within a tolerance; a plan must keep to it exactly.
    fits = solution.hbm_R.max() <= capacity.hbm_bytes and solution.host_R.max() <= capacity.host_bytes
    return solution if fits and solution.cost < packing.cost else packing


class _Place:
    """One or more shards of an option on certain ranks. last: whether it is the narrower last column block."""

    def __init__(self, option: int, of: Option, ranks: np.ndarray, last: bool) -> None:
        self.option, self.ranks, self.last = option, ranks, last
        self.seconds = np.full(len(ranks), of.seconds)
        self.hbm = np.full(len(ranks), of.hbm)
        self.host = np.full(len(ranks), of.host)
        alone = of.scope is Scope.RANK
        if last or not alone or of.shards == 1:
            odd = slice(None) if alone else slice(of.odd, of.odd + 1)
            self.seconds[odd] += of.odd_seconds
            self.hbm[odd] += of.odd_hbm


def _places(index: int, pair: tuple[int, Option], capacity: Capacity) -> list[_Place]:
    option = pair[1]
    ranks = np.arange(capacity.ranks)
    match option.scope:
        case Scope.ALL:
            return [_Place(index, option, ranks, False)]
        case Scope.HOST:
            return [_Place(index, option, host, False) for host in ranks.reshape(-1, capacity.ranks_per_host)]
        case _:
            kinds = [False, True] if option.shards > 1 else [False]
            return [_Place(index, option, ranks[rank : rank + 1], last) for last in kinds for rank in range(len(ranks))]


def _rows(entries: list[tuple[int, int, float]], rows: int, count: int) -> coo_array:
    row, column, value = (np.array(part) for part in zip(*entries, strict=True))
    return coo_array((value, (row, column)), shape=(rows, count))


def _choice(options: list[tuple[int, Option]], places: list[_Place], count: int) -> list[LinearConstraint]:
    """Constraints: one option a table, its shards all placed, at most one shard of a table on a rank."""
    tables = options[-1][0] + 1
    one = [(table, 1 + index, 1.0) for index, (table, _) in enumerate(options)]
    shards: list[tuple[int, int, float]] = []
    for index, (_, option) in enumerate(options):
        lasts = int(option.scope is Scope.RANK and option.shards > 1)
        each = max(1, option.shards // len(_group(option))) - lasts
        shards += [(2 * index, 1 + index, -float(each)), (2 * index + 1, 1 + index, -float(lasts))]
    apart: list[tuple[int, int, float]] = []
    for variable, place in enumerate(places, start=1 + len(options)):
        shards.append((2 * place.option + place.last, variable, 1.0))
        if options[place.option][1].scope is Scope.RANK:
            apart.append((int(place.ranks[0]) * len(options) + place.option, variable, 1.0))
    constraints = [
        LinearConstraint(_rows(one, tables, count), 1.0, 1.0),
        LinearConstraint(_rows(shards, 2 * len(options), count), 0.0, 0.0),
    ]
    if apart:
        rows = {row: place for place, row in enumerate(sorted({row for row, _, _ in apart}))}
        packed = [(rows[row], column, value) for row, column, value in apart]
        constraints.append(LinearConstraint(_rows(packed, len(rows), count), 0.0, 1.0))
    return constraints


def _group(option: Option) -> range:
    """The indices of the shards of one place."""
    return range({Scope.ALL: option.shards, Scope.HOST: option.group}.get(option.scope, 1))


def _loads(options: int, places: list[_Place], packing: Packing, count: int) -> list[LinearConstraint]:
    """Constraints: no rank is above the cost or its memories. Units are near 1: HiGHS has absolute tolerances."""
    capacity = packing.capacity
    seconds = [(rank, 0, -1.0) for rank in range(capacity.ranks)]
    hbm, host = [(0, 0, 0.0)], [(0, 0, 0.0)]
    for variable, place in enumerate(places, start=1 + options):
        for at, rank in enumerate(place.ranks.tolist()):
            seconds.append((rank, variable, float(place.seconds[at]) / packing.cost))
            hbm.append((rank, variable, float(place.hbm[at]) / capacity.hbm_bytes))
            host.append((rank, variable, float(place.host[at]) / max(capacity.host_bytes, 1.0)))
    return [
        LinearConstraint(_rows(seconds, capacity.ranks, count), -np.inf, 0.0),
        LinearConstraint(_rows(hbm, capacity.ranks, count), -np.inf, 1.0),
        LinearConstraint(_rows(host, capacity.ranks, count), -np.inf, 1.0),
    ]


def _packing(x: np.ndarray, options: list[tuple[int, Option]], places: list[_Place], empty: Packing) -> Packing:
    chosen = x > 0.5
    for index, (table, option) in enumerate(options):
        if not chosen[1 + index]:
            continue
        at = [p for v, p in enumerate(places, start=1 + len(options)) if p.option == index and chosen[v]]
        at.sort(key=lambda place: place.last)
        empty.put(table, option, np.concatenate([place.ranks for place in at]))
    return empty

"""Packs tables onto ranks under a target cost: best fit first, then ruin and recreate (Schrimpf et al., 2000).

Each table is inserted by the option, and on the ranks, that add the lowest total cost and the smallest excess over the
targets. To improve, tables of an overloaded rank and of some others are removed and inserted again in another order; a
result that is not worse is kept.

T tables, O options, R ranks.
"""

from dataclasses import dataclass

import numpy as np

from gr.planner.candidates import Capacity, Options, Scope

# Weights of an excess relative to its target, in units of the target seconds.
OVERLOAD_WEIGHT = 20.0
MEMORY_WEIGHT = 0.05
RUINED = 12  # tables removed at once, at most
TIGHT = 0.5  # share of all memory above which shards are placed by their bytes as well as by their seconds
EVERYWHERE = 0.2  # share of the target above which tables on all ranks leave the others no more than the rest of it
# Options that are tried: among those with room for all their shards, and among all where none has room.
FITTING, OTHERS = 3, 9
COUNTS = 10  # smallest counts of shards that are all tried
PATIENCE = 60  # rounds without a gain of a thousandth
FAR = 1e6  # seconds: more than any load


@dataclass(frozen=True)
class Targets:
    """Limits for each rank that packing aims at. hbm: bytes, which may be exceeded where capacity may not."""

    seconds: float
    hbm: float


@dataclass(frozen=True)
class Option:
    """One option of one table. odd: index of the shard that is unlike the others."""

    index: int
    total: float
    seconds: float
    hbm: float
    host: float
    shards: int
    scope: Scope
    odd: int
    odd_seconds: float
    odd_hbm: float
    group: int  # ranks a host

    @property
    def odd_ones(self) -> slice:
        """The odd shards: one, or one on every host of a grid."""
        return slice(self.odd, None if self.scope is Scope.HOST else self.odd + 1, self.group)

    @property
    def largest(self) -> float:
        """Seconds of the costliest shard."""
        return self.seconds + max(self.odd_seconds, 0.0)


class Packing:
    """The options and ranks of tables, and the load of each rank."""

    def __init__(self, capacity: Capacity, choices: "Choices") -> None:
        self.capacity, self.allowed_TR = capacity, choices.allowed_TR
        self.seconds_R = np.zeros(capacity.ranks)
        self.hbm_R = np.zeros(capacity.ranks)
        self.host_R = np.zeros(capacity.ranks)
        self.ranks_T: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(choices.every_T)
        self._every_T = choices.every_T
        self._choices_T: list[Focused] = []
        self._chosen_T = [every[0] for every in choices.every_T]
        self._urgency_T = np.zeros(len(choices.every_T))
        self._is_tight = False
        self._random = np.random.default_rng(0)

    def put(self, table: int, option: Option, ranks: np.ndarray) -> None:
        """Adds a table that is not in the packing yet."""
        self._chosen_T[table], self.ranks_T[table] = option, ranks
        self._shift(table, 1.0)

    @property
    def option_T(self) -> np.ndarray:
        return np.array([option.index for option in self._chosen_T])

    @property
    def cost(self) -> float:
        return float(self.seconds_R.max())

    def fill(self, targets: Targets, relaxed_T: np.ndarray) -> bool:
        """Inserts every table; False where one does not fit the memory.

        relaxed_T: the options of the relaxation. Tables that it puts on all ranks are inserted first and never moved,
        then tables on whole hosts, because later there may be no room on every rank; then the largest first.
        """
        self._choices_T = [Focused(every, targets.seconds) for every in self._every_T]
        hints = [
            next((one for one in choices.all if one.index == option), choices.all[0])
            for choices, option in zip(self._choices_T, relaxed_T, strict=True)
        ]
        memory = self.capacity.hbm_bytes
        self._is_tight = sum(hint.hbm * hint.shards for hint in hints) > TIGHT * memory * self.capacity.ranks
        everywhere = sum(hint.seconds for hint in hints if hint.scope is Scope.ALL)
        urgency_T = np.zeros(len(self._every_T))
        for table, hint in enumerate(hints):
            if hint.scope is Scope.ALL:
                self._choices_T[table] = Focused([hint], targets.seconds)
            elif everywhere > EVERYWHERE * targets.seconds:
                self._choices_T[table] = Focused(self._every_T[table], targets.seconds - everywhere)
            # A shard takes at most the whole target, or twice that where memory or the finest cut force it.
            rank = {Scope.ALL: 8.0, Scope.HOST: 4.0, Scope.HOST_RANKS: 4.0}.get(hint.scope, 0.0)
            share = max(hint.seconds / targets.seconds, hint.hbm / memory if self._is_tight else 0.0)
            urgency_T[table] = rank + min(share, 2.0)
        self._urgency_T = urgency_T
        return all(self._insert(int(table), targets) for table in np.argsort(-urgency_T, kind="stable"))

    def within(self, targets: Targets) -> bool:
        return self.cost <= targets.seconds and bool(self.hbm_R.max() <= targets.hbm)

    def improve(self, targets: Targets, rounds: int) -> None:
        """Ruins and recreates until every rank is within the targets, for at most `rounds` rounds."""
        excess = _penalty(self.seconds_R, self.hbm_R, targets)
        movable = [t for t, option in enumerate(self._chosen_T) if option.scope is not Scope.ALL]
        on_R = self._tables_on_ranks(movable)
        patience = PATIENCE
        for _ in range(rounds):
            if not movable or self.within(targets) or not patience:
                return
            patience -= 1
            out = self._ruined(on_R, movable, targets)
            saved = [(table, self._chosen_T[table], self.ranks_T[table]) for table in out]
            loads = self.seconds_R.copy(), self.hbm_R.copy(), self.host_R.copy()
            for table in out:
                self._shift(table, -1.0)
            order = sorted(out, key=lambda t: -self._urgency_T[t] * self._random.uniform(0.7, 1.3))
            complete = all(self._insert(table, targets) for table in order)
            if complete and (now := _penalty(self.seconds_R, self.hbm_R, targets)) <= excess * (1 + 1e-9):
                patience = PATIENCE if now < excess * (1 - 1e-3) else patience
                excess = now
                for table, _option, ranks in saved:
                    for rank in ranks:
                        on_R[rank].discard(table)
                for table in out:
                    self._note(on_R, table)
                continue
            self.seconds_R, self.hbm_R, self.host_R = loads
            for table, option, ranks in saved:
                self._chosen_T[table], self.ranks_T[table] = option, ranks

    def _tables_on_ranks(self, tables: list[int]) -> list[set[int]]:
        on_R: list[set[int]] = [set() for _ in range(self.capacity.ranks)]
        for table in tables:
            self._note(on_R, table)
        return on_R

    def _note(self, on_R: list[set[int]], table: int) -> None:
        if self._chosen_T[table].scope is not Scope.ALL:
            for rank in self.ranks_T[table]:
                on_R[rank].add(table)

    def _ruined(self, on_R: list[set[int]], movable: list[int], targets: Targets) -> list[int]:
        """Tables of an overloaded rank, of a rank with little load or a random one, and a few random tables."""
        draw, ranks = self._random, self.capacity.ranks
        over_R = np.maximum(self.seconds_R / targets.seconds - 1.0, 0.0)
        if not over_R.any():
            over_R = np.maximum(self.hbm_R / targets.hbm - 1.0, 0.0)
        worst = int(over_R.argmax() if draw.random() < 0.3 else draw.choice(np.flatnonzero(over_R)))
        few = min(8, ranks)
        other = int(np.argpartition(self.seconds_R, few - 1)[draw.integers(few)])
        if draw.random() < 0.5:
            other = int(draw.integers(ranks))
        anywhere = [movable[int(i)] for i in draw.integers(0, len(movable), int(draw.integers(0, 4)))]
        out = list(dict.fromkeys([*sorted(on_R[worst] | on_R[other]), *anywhere]))
        draw.shuffle(out)
        return out[:RUINED]

    def _shift(self, table: int, sign: float) -> None:
        option, ranks = self._chosen_T[table], self.ranks_T[table]
        self.seconds_R[ranks] += sign * option.seconds
        self.hbm_R[ranks] += sign * option.hbm
        self.host_R[ranks] += sign * option.host
        odd = ranks[option.odd_ones]
        self.seconds_R[odd] += sign * option.odd_seconds
        self.hbm_R[odd] += sign * option.odd_hbm

    def _insert(self, table: int, targets: Targets) -> bool:
        """Places a table by the best of its options; False where none fits the memory."""
        best: tuple[float, Option, np.ndarray] | None = None
        for option in self._candidates(table, targets):
            if best is not None and option.total >= best[0]:
                break  # they come cheapest first
            placed = self._place(table, option, targets)
            if placed is not None and (best is None or option.total + placed[0] < best[0]):
                best = (option.total + placed[0], option, placed[1])
        if best is None:
            return False
        self.put(table, best[1], best[2])
        return True

    def _candidates(self, table: int, targets: Targets) -> list[Option]:
        """Options worth placing: all of wide scope, and the cheapest others that find room, or a sample."""
        choices = self._choices_T[table]
        if not choices.alone:
            return choices.all
        free_R = np.sort(targets.seconds - self.seconds_R)
        room = len(free_R) - np.searchsorted(free_R, choices.alone_seconds)
        if self._is_tight:
            free_R = np.sort(self.capacity.hbm_bytes - self.hbm_R)
            room = np.minimum(room, len(free_R) - np.searchsorted(free_R, choices.alone_hbm))
        fitting = np.flatnonzero(room >= choices.alone_wide)
        if len(fitting):
            alone = [choices.alone[i] for i in fitting[:FITTING]]
        else:
            alone = [choices.alone[i] for i in range(0, len(choices.alone), max(1, len(choices.alone) // OTHERS))]
        return sorted([*alone, *choices.wide], key=lambda option: option.total)

    def _place(self, table: int, option: Option, targets: Targets) -> tuple[float, np.ndarray] | None:
        """(penalty for the excess over the targets, ranks) of an option at its best; None where it does not fit."""
        key_R = self._keys(table, option, targets, (option.seconds, option.hbm))
        if option.scope is Scope.ALL:
            ranks = np.arange(len(key_R)) if np.isfinite(key_R).all() else None
        elif option.scope is Scope.RANK and option.odd_seconds < 0 and option.shards > 1:
            ranks = self._with_last(table, option, targets, key_R)
        else:
            ranks = self._best_ranks(option, key_R)
        if ranks is None:
            return None
        after, hbm = self.seconds_R[ranks] + option.seconds, self.hbm_R[ranks] + option.hbm
        after[option.odd_ones] += option.odd_seconds
        hbm[option.odd_ones] += option.odd_hbm
        if (hbm > self.capacity.hbm_bytes).any():
            return None
        return _penalty(after, hbm, targets), ranks

    def _keys(self, table: int, option: Option, targets: Targets, shard: tuple[float, float]) -> np.ndarray:
        """A key for each rank, smallest where a shard of (seconds, bytes) goes best, infinite where it does not fit.

        The best rank is the fullest one that the shard leaves within the target, or else the least loaded. Where memory
        is tight, bytes make a rank full as seconds do.
        """
        seconds, bytes_ = shard
        beyond_R = self.seconds_R > targets.seconds - seconds
        fullness_R = self.seconds_R
        if self._is_tight:
            fullness_R = self.seconds_R + self.hbm_R * (targets.seconds / self.capacity.hbm_bytes)
        key_R = np.where(beyond_R, self.seconds_R + FAR, -fullness_R)
        if targets.hbm < self.capacity.hbm_bytes:
            key_R[self.hbm_R > targets.hbm - bytes_] += FAR / 2
        full_R = self.hbm_R > self.capacity.hbm_bytes - bytes_
        if option.host:
            full_R |= self.host_R > self.capacity.host_bytes - option.host
        if self.allowed_TR is not None:
            full_R |= ~self.allowed_TR[table]
        key_R[full_R] = np.inf
        return key_R

    def _with_last(self, table: int, option: Option, targets: Targets, key_R: np.ndarray) -> np.ndarray | None:
        """The ranks of equal column blocks, then of the narrower last one, which fits where they do not."""
        equal = _smallest(key_R, option.shards - 1)
        if equal is None:
            return None
        last = (option.seconds + option.odd_seconds, option.hbm + option.odd_hbm)
        key_R = self._keys(table, option, targets, last)
        key_R[equal] = np.inf
        narrow = _smallest(key_R, 1)
        return None if narrow is None else np.concatenate([equal, narrow])

    def _best_ranks(self, option: Option, key_R: np.ndarray) -> np.ndarray | None:
        local = self.capacity.ranks_per_host
        if option.scope is Scope.RANK:
            return _smallest(key_R, option.shards)
        key_HL = key_R.reshape(-1, local)
        if option.scope is Scope.HOST:
            hosts = _smallest(key_HL.max(axis=1), option.shards // local)
            return None if hosts is None else (hosts[:, None] * local + np.arange(local)).ravel()
        host = int(np.argmin(np.partition(key_HL, option.shards - 1, axis=1)[:, option.shards - 1]))
        inside = _smallest(key_HL[host], option.shards)
        return None if inside is None else inside + host * local


def _penalty(seconds: np.ndarray, hbm: np.ndarray, targets: Targets) -> float:
    """The excess over the targets, weighted more than in proportion: one large excess is worse than many small ones."""
    over = np.maximum(seconds / targets.seconds - 1.0, 0.0)
    more = np.maximum(hbm / targets.hbm - 1.0, 0.0)
    return float(
        targets.seconds
        * (OVERLOAD_WEIGHT * (over.sum() + 3.0 * (over @ over)) + MEMORY_WEIGHT * (more.sum() + more @ more))
    )


def _smallest(key: np.ndarray, count: int) -> np.ndarray | None:
    """The indices of the `count` smallest keys, smallest first; None where fewer keys are finite."""
    if count > len(key):
        return None
    if count == 1:
        chosen = np.array([key.argmin()])
    else:
        chosen = np.argpartition(key, count - 1)[:count]
        chosen = chosen[np.argsort(key[chosen], kind="stable")]
    return chosen if np.isfinite(key[chosen[-1]]) else None


class Focused:
    """The options of one table that are worth trying with shards of at most `seconds`, cheapest first.

    alone: options of scope RANK with the smallest counts of shards and some larger ones, three widths of each. wide:
    all others.
    """

    def __init__(self, every: list[Option], seconds: float) -> None:
        within = [option for option in every if option.largest <= seconds]
        within = within or [min(every, key=lambda option: option.largest)]
        alone = [option for option in within if option.scope is Scope.RANK]
        self.wide = [option for option in within if option.scope is not Scope.RANK]
        counts = sorted({option.shards for option in alone})
        self.alone: list[Option] = []
        for count in [*counts[:COUNTS], *counts[COUNTS::COUNTS]]:
            same = sorted((option for option in alone if option.shards == count), key=lambda o: o.seconds)
            self.alone += [same[i] for i in sorted({0, len(same) // 2, len(same) - 1})]
        # Among equal counts of shards the widest come first: they fill ranks, and leave one narrow block.
        self.alone.sort(key=lambda o: (o.shards, o.total, -o.seconds))
        self.all = sorted([*self.alone, *self.wide], key=lambda o: o.total)
        self.alone_seconds = np.array([option.seconds for option in self.alone])
        self.alone_hbm = np.array([option.hbm for option in self.alone])
        self.alone_wide = np.array([option.shards - (option.odd_seconds < 0) for option in self.alone])


class Choices:
    """The usable options of every table in the form that Packing reads, cheapest first."""

    def __init__(self, options: Options, usable_O: np.ndarray, ranks_per_host: int) -> None:
        self.allowed_TR = options.allowed_TR
        self.every_T = _choices(options, usable_O, ranks_per_host)


def _choices(options: Options, usable_O: np.ndarray, ranks_per_host: int) -> list[list[Option]]:
    """The usable options of each table, cheapest first."""
    order = np.lexsort((options.total_seconds_O, options.table_O))
    order = order[usable_O[order]]
    choices: list[list[Option]] = [[] for _ in range(options.tables)]
    columns = (
        options.total_seconds_O,
        options.seconds_O,
        options.hbm_O,
        options.host_O,
        options.shards_O,
        options.scope_O,
        options.extra_shard_O,
        options.extra_seconds_O,
        options.extra_hbm_O,
    )
    rows = zip(order.tolist(), options.table_O[order].tolist(), *(c[order].tolist() for c in columns), strict=True)
    for index, table, total, seconds, hbm, host, shards, scope, odd, odd_seconds, odd_hbm in rows:
        numbers = (index, total, seconds, hbm, host, shards)
        choices[table].append(Option(*numbers, Scope(scope), odd, odd_seconds, odd_hbm, ranks_per_host))
    return choices

"""The definition of an id table: a set-associative map from raw 64-bit ids to rows, with admission and eviction.

S sets of A ways; row s A + w is way w of set s. An id's set is a hash of the id alone, and the ways of a set are
contended by its own ids only. Who wins is decided once a step, from the uses of each id in the global batch, in an
order that names no rank. So the map is a function of the stream, whatever the number of ranks that share the sets. Way
0 of a set never holds an id: the ids of the set that have no row share it.

U distinct ids of a step, N of them that enter.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gr.ops.huge_pages import take_huge_pages
from gr.ops.splitmix64 import shift_right, splitmix64

EMPTY = torch.iinfo(torch.int64).min
MOST_SETS = 2**31
# Of each row, for the ids that have none: how often they were used is estimated from above (a count-min sketch of one
# row, of the set's own ids). With them a row takes 16 bytes, without 13.
COUNTERS = 3
MOST_COUNT = 255
EMPTY_SCORE = -1


@dataclass(frozen=True)
class IdTable:
    """The sets [first, first + s) of a table of `sets` sets.

    key_SA: int64, the id of each way, EMPTY for none. score_SA: who is weakest is evicted; EMPTY_SCORE for an empty
    way. int32 under LRU: the stamp of the last use. float32 under LFU: the sum of uses times stamps. seen_SC: uint8,
    uses of ids without a row, C = COUNTERS times ways; None where an id's first use admits it. tag_SA: uint8, eight
    bits of the key's hash, by which the C++ finds it.
    """

    key_SA: Tensor
    score_SA: Tensor
    tag_SA: Tensor
    seen_SC: Tensor | None
    first: int
    sets: int

    @classmethod
    def empty(cls, first: int, stop: int, sets: int, ways: int, score: torch.dtype, *, counted: bool) -> "IdTable":
        """Sets [first, stop) without ids."""
        empty_tag = int(tag_of(torch.tensor(EMPTY)))
        key_SA, score_SA, tag_SA = (
            _filled(stop - first, ways, value, dtype)
            for value, dtype in ((EMPTY, torch.int64), (EMPTY_SCORE, score), (empty_tag, torch.uint8))
        )
        seen_SC = _filled(stop - first, COUNTERS * ways, 0, torch.uint8) if counted else None
        return cls(key_SA, score_SA, tag_SA, seen_SC, first, sets)

    @property
    def ways(self) -> int:
        return self.key_SA.shape[1]


def _filled(sets: int, width: int, value: int, dtype: torch.dtype) -> Tensor:
    """In huge pages: a step reads lines of a table that lie far apart."""
    tensor = torch.empty(sets, width, dtype=dtype)
    take_huge_pages(tensor)
    return tensor.fill_(value)


class Step(NamedTuple):
    """The outcome of a step for its ids. row_U: int64, of the whole table; way 0 of the set for an id without a row.

    entered_N: int64, indices into U of the ids that were given a row. evicted_N: int64, whose row it was; EMPTY for
    none.
    """

    row_U: Tensor
    entered_N: Tensor
    evicted_N: Tensor


def set_of(ids: Tensor, sets: int) -> Tensor:
    """The set of each id, int64 in [0, sets)."""
    return (shift_right(splitmix64(ids), 32) * sets) >> 32


def tag_of(ids: Tensor) -> Tensor:
    """The tag of each id, uint8."""
    return (splitmix64(ids) & 0xFF).to(torch.uint8)


def count_ids_reference(ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct ids [U] in any order, how often each occurs [U], the place of each of ids_T among them [T])."""
    ids_U, place_T, uses_U = ids_T.unique(return_inverse=True, return_counts=True)
    return ids_U, uses_U, place_T


def find_reference(key_SA: Tensor, first: int, sets: int, ids_T: Tensor) -> Tensor:
    """The row of each id, int64 [T], way 0 of its set for one without a row; key_SA: of the sets from `first` on."""
    set_T = set_of(ids_T, sets) - first
    way_T = (key_SA[set_T] == ids_T[:, None]).int().argmax(1)
    return (set_T + first) * key_SA.shape[1] + way_T


def id_table_reference(table: IdTable, ids_U: Tensor, uses_U: Tensor, stamp: float, min_count: int) -> Step:
    """One step: changes the table in place. ids_U: distinct, of this table's sets. uses_U: of each in the step.

    An id of no uses (a candidate) is looked up and changes nothing. A use of an id that has a row renews its score. An
    id without one is admitted where its uses, seen ones included, reach min_count: those of a set, most uses of this
    step first, then the least id, take its weakest ways in their order (the lowest score first, then the lowest way),
    each if it is stronger than what it takes.
    """
    key_SA, score_SA, ways = table.key_SA, table.score_SA, table.ways
    set_U = set_of(ids_U, table.sets) - table.first
    match_UA = key_SA[set_U] == ids_U[:, None]
    way_U = match_UA.int().argmax(1)  # 0, the shared way, where nothing matches
    score_U = _entry_scores(score_SA, uses_U, stamp)
    hit_U = match_UA.any(1) & (uses_U > 0)
    if score_SA.dtype == torch.int32:
        score_SA[set_U[hit_U], way_U[hit_U]] = score_U[hit_U]
    else:
        score_SA[set_U[hit_U], way_U[hit_U]] += score_U[hit_U]
    new_N = (~match_UA.any(1) & (uses_U > 0)).nonzero().squeeze(1)
    if table.seen_SC is not None:
        new_N = new_N[_count(table.seen_SC, set_U[new_N], ids_U[new_N], uses_U[new_N]) >= min_count]
    for by in (ids_U, -uses_U, set_U):  # stable: the last one decides first
        new_N = new_N[by[new_N].argsort(stable=True)]
    set_N = set_U[new_N]
    place_N = torch.arange(len(new_N)) - torch.searchsorted(set_N, set_N)  # among the contenders of its set
    new_N, set_N, place_N = (x[place_N < ways - 1] for x in (new_N, set_N, place_N))
    touched, inverse_N = set_N.unique(return_inverse=True)
    strength = score_SA[touched].double()
    strength[:, 0] = torch.inf
    way_N = strength.argsort(dim=1, stable=True)[inverse_N, place_N]
    wins_N = score_U[new_N] > strength[inverse_N, way_N]
    new_N, set_N, way_N = new_N[wins_N], set_N[wins_N], way_N[wins_N]
    evicted_N = key_SA[set_N, way_N]
    key_SA[set_N, way_N], score_SA[set_N, way_N] = ids_U[new_N], score_U[new_N]
    table.tag_SA[set_N, way_N] = tag_of(ids_U[new_N])
    way_U[new_N] = way_N
    return Step((set_U + table.first) * ways + way_U, new_N, evicted_N)


def _entry_scores(score_SA: Tensor, uses_U: Tensor, stamp: float) -> Tensor:
    if score_SA.dtype == torch.int32:
        return torch.full_like(uses_U, int(stamp), dtype=torch.int32)
    return (uses_U.double() * stamp).float()


def _count(seen_SC: Tensor, set_N: Tensor, ids_N: Tensor, uses_N: Tensor) -> Tensor:
    """Adds the uses of ids without a row to their counters; returns what these then hold."""
    counters = seen_SC.shape[1]
    slot_N = ((splitmix64(ids_N) & 0xFFFFFFFF) * counters) >> 32
    flat_N, place_N = (set_N * counters + slot_N).unique(return_inverse=True)
    sums = seen_SC.view(-1)[flat_N].long().index_add_(0, place_N, uses_N).clamp_(max=MOST_COUNT)
    seen_SC.view(-1)[flat_N] = sums.to(torch.uint8)
    return sums[place_N]

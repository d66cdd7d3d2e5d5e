"""The k best items of many queries: exact, over blocks of item vectors, without a matrix of all scores.

A block's scores are looked at once: the largest of every 32 is compared with the query's k-th best so far, and only the
few groups above it are opened. Items are scanned in the order of their ids and a score must be strictly greater to
enter, so of equal scores the smaller id stays, which is the rule of gr.ops.top_k.

B queries, E items, D width, K results, N items of a block, G items of a group, C candidates.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.errors import ServingError
from gr.ops.top_k import best

GROUP = 32
# Scores of a block: 1 MB, so that they are still in a core's cache when they are read again.
BLOCK_SCORES = 1 << 18
LARGEST_BLOCK = 1 << 16


@dataclass(frozen=True)
class Seen:
    """Items that must not be among a query's results. ids_S: int64, packed by query. offsets_B1: int64."""

    ids_S: Tensor
    offsets_B1: Tensor


class ExactIndex:
    """Item vectors in shards of rows, searched without approximation."""

    def __init__(self, ids_E: Tensor, shards: Sequence[Tensor], *, threads: int = 1) -> None:
        """ids_E: int64, strictly ascending, above 0. shards: float32 [rows, D] each, of the items in the order of ids.

        threads: parts of the items that are searched side by side; each thread runs torch with the number of threads of
        its own that the process set. Raises ServingError where ids and vectors do not fit together.
        """
        self.ids_E, self.shards, self.threads = ids_E, [shard for shard in shards if len(shard)], threads
        rows = sum(map(len, self.shards))
        if rows != len(ids_E) or not rows:
            raise ServingError(f"the retrieval index has {len(ids_E)} ids and {rows} item vectors; export it again")
        if int(ids_E[0]) < 1 or bool((ids_E.diff() <= 0).any()):
            raise ServingError("ids of the retrieval index must be above 0 and ascend; export it again")
        self.dim = self.shards[0].shape[1]
        self._longest = max(float(shard.square().sum(1).max().sqrt()) for shard in self.shards)
        if not self._longest < torch.inf:
            raise ServingError("item vectors of the retrieval index are not finite: the model has diverged")
        self._firsts = torch.tensor([0, *map(len, self.shards)])[:-1].cumsum(0)
        self._pool = ThreadPoolExecutor(threads, "retrieval-index") if threads > 1 else None

    def __len__(self) -> int:
        return len(self.ids_E)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    @torch.inference_mode()
    def top(self, queries_BD: Tensor, k: int, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
        """The k best items of each query: ids, int64 [B, K], and scores, float32 [B, K], best first.

        Of equal scores the smaller id is first. Where fewer are left, the score is minus infinity and the id 0. Raises
        ServingError for a k that the index does not have and for queries whose scores would not be finite.
        """
        self.check(queries_BD, k)
        if not len(queries_BD):
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
        seen_S = self._seen_places(seen)
        parts = self._parts(len(queries_BD))

        def search(part: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
            return _search(queries_BD, part, k, seen_S)

        found = [search(part) for part in parts] if self._pool is None else list(self._pool.map(search, parts))
        scores_BK, places_BK = found[0]
        if len(found) > 1:
            scores_BC, places_BC = (torch.cat(each, 1) for each in zip(*found, strict=True))
            scores_BK, places_BK = best(scores_BC, places_BC, k)
        return self.ids_E[places_BK].masked_fill(scores_BK == -torch.inf, 0), scores_BK

    def check(self, queries_BD: Tensor, k: int) -> None:
        """Raises ServingError as `top` says."""
        if not 1 <= k <= len(self):
            raise ServingError(f"k={k}: the index has {len(self)} items; ask for 1 up to that")
        longest = float(queries_BD.double().square().sum(1).max().sqrt()) if len(queries_BD) else 0.0
        if not longest * self._longest < torch.finfo(torch.float32).max:
            raise ServingError("the scores of a query are not finite: the model has diverged, there is nothing to rank")

    def vectors(self, places: Tensor) -> Tensor:
        """The vectors of the items at `places`, int64 of any shape, as [..., D]."""
        if len(self.shards) == 1:
            return F.embedding(places, self.shards[0])
        flat = places.flatten()
        out = torch.empty(len(flat), self.dim)
        shard = torch.bucketize(flat, self._firsts, right=True) - 1
        for index, (first, rows) in enumerate(zip(self._firsts.tolist(), self.shards, strict=True)):
            inside = (shard == index).nonzero()[:, 0]
            out[inside] = rows[flat[inside] - first]
        return out.view(*places.shape, self.dim)

    def _parts(self, B: int) -> list[list[tuple[int, Tensor]]]:
        """The blocks [N, D] of the items with their first places, dealt in runs of about equal length to threads."""
        rows = min(BLOCK_SCORES // B, LARGEST_BLOCK) // GROUP * GROUP or GROUP
        blocks = [
            (first + start, shard[start : start + rows])
            for first, shard in zip(self._firsts.tolist(), self.shards, strict=True)
            for start in range(0, len(shard), rows)
        ]
        cuts = [len(blocks) * part // self.threads for part in range(self.threads + 1)]
        return [blocks[a:b] for a, b in pairwise(cuts) if a < b]

    def _seen_places(self, seen: Seen | None) -> tuple[Tensor, Tensor]:
        """(place, query) of every seen item that the index has, by place."""
        if seen is None or not len(seen.ids_S):
            nothing = torch.zeros(0, dtype=torch.int64)
            return nothing, nothing
        query_S = torch.arange(len(seen.offsets_B1) - 1).repeat_interleave(seen.offsets_B1.diff())
        place_S = torch.searchsorted(self.ids_E, seen.ids_S).clamp_(max=len(self) - 1)
        known = self.ids_E[place_S] == seen.ids_S
        place_S, order = place_S[known].sort()
        return place_S, query_S[known][order]


def _search(
    queries_BD: Tensor, blocks: list[tuple[int, Tensor]], k: int, seen: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The k best of consecutive blocks: scores and places, [B, K] each."""
    place_S, query_S = seen
    B = len(queries_BD)
    largest = max(len(items_ND) for _, items_ND in blocks)
    groups = -(-largest // GROUP)
    scores_NB = torch.empty(groups * GROUP, B)
    queries_BD = queries_BD.contiguous()
    top = _RunningTop(B, k)
    for first, items_ND in blocks:
        N = len(items_ND)
        torch.mm(items_ND, queries_BD.T, out=scores_NB[:N])
        if N < len(scores_NB):
            scores_NB[N:] = -torch.inf
        if len(place_S):
            low, high = torch.searchsorted(place_S, torch.tensor([first, first + N])).tolist()
            scores_NB[place_S[low:high] - first, query_S[low:high]] = -torch.inf
        top.add(scores_NB, first)
    return top.result()


class _RunningTop:
    """The k best so far of B queries, and what came since that may be among them."""

    def __init__(self, B: int, k: int) -> None:
        self.k = k
        self._scores_BK, self._places_BK = torch.full((B, k), -torch.inf), torch.zeros(B, k, dtype=torch.int64)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []  # query, place, score of candidates
        self._count = 0
        self._threshold_B = self._scores_BK[:, -1]
        self._empty = True

    def add(self, scores_NB: Tensor, first: int) -> None:
        """The scores of a block whose first item is at place `first`; N is a multiple of GROUP."""
        if self._empty:  # everything is above minus infinity
            scores_BN = scores_NB.T.contiguous()
            places_N = torch.arange(first, first + len(scores_NB))
            self._merge(scores_BN, places_N.expand_as(scores_BN))
            self._empty = False
            return
        # Item j * N/G + i of the block is the j-th of group i: the maximum then runs over whole rows of memory.
        scores_GIB = scores_NB.view(GROUP, -1, scores_NB.shape[1])
        group, query = (scores_GIB.amax(0) > self._threshold_B).nonzero(as_tuple=True)
        if not len(group):
            return
        opened_GC = scores_GIB[:, group, query]
        item, which = (opened_GC > self._threshold_B[query]).nonzero(as_tuple=True)
        places_C = first + item * scores_GIB.shape[1] + group[which]
        self._pending.append((query[which], places_C, opened_GC[item, which]))
        self._count += len(which)
        if self._count >= self._scores_BK.numel():
            self._flush()

    def result(self) -> tuple[Tensor, Tensor]:
        self._flush()
        return self._scores_BK, self._places_BK

    def _flush(self) -> None:
        """Takes the pending candidates in, a row a query; the threshold rises."""
        if not self._count:
            return
        query_C, places_C, scores_C = (torch.cat(each) for each in zip(*self._pending, strict=True))
        query_C, order = query_C.sort(stable=True)
        counts_B = torch.bincount(query_C, minlength=len(self._scores_BK))
        column_C = torch.arange(len(query_C)) - (counts_B.cumsum(0) - counts_B)[query_C]
        scores_BC = torch.full((len(counts_B), int(counts_B.max())), -torch.inf)
        places_BC = torch.zeros_like(scores_BC, dtype=torch.int64)
        scores_BC[query_C, column_C], places_BC[query_C, column_C] = scores_C[order], places_C[order]
        self._pending, self._count = [], 0
        self._merge(scores_BC, places_BC)

    def _merge(self, scores_BC: Tensor, places_BC: Tensor) -> None:
        self._scores_BK, self._places_BK = best(
            torch.cat([self._scores_BK, scores_BC], 1), torch.cat([self._places_BK, places_BC], 1), self.k
        )
        self._threshold_B = self._scores_BK[:, -1].contiguous()

"""Ranks of held-out items over the full corpus, against sharded tables, without gathering them on one rank.

Every rank scores its slice of the corpus for the queries of all ranks and counts what beats the target; the counts
are summed. That is what merging top-k lists would give, for every k at once; on CPU a score has the same bits on any
number of ranks, and so have all ranks of items. R ranks, B queries a rank, C_r items.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from gr.batch import EvaluationBatch
from gr.dist import World
from gr.errors import DataError, TrainingError
from gr.ops.corpus_counts import corpus_counts, target_scores
from gr.ops.top_k import best
from gr.tasks.similarity import MixtureOfLogits, Similarity

LOOKUP_CHUNK = 1 << 16
SCORE_BLOCK = 1 << 15
QUERY_BLOCK = 1 << 7  # with a block of items, scores of 16 MiB: up to 32 MiB, the C library hands out used pages again


class CorpusRanker:
    """Ranks targets among the corpus. Holds this rank's slice of the item vectors: C/R rows of width D.

    Queries are those that the similarity has made. Of a mixture of logits, gates are computed only for pairs that can
    reach what they are compared with: the target's score, or that of the k-th best item.
    """

    def __init__(
        self, corpus_C: Tensor, lookup: Callable[[Tensor], Tensor], similarity: Similarity, world: World
    ) -> None:
        """corpus_C: int64, ascending. lookup: ids [K] -> vectors [K, D]; collective, called equally often by ranks."""
        self.world = world
        slices = torch.arange(world.size + 1) * len(corpus_C) // world.size
        first, last = int(slices[world.rank]), int(slices[world.rank + 1])
        self.ids = corpus_C[first:last].to(world.device)
        chunks = -(-int(slices.diff().max()) // LOOKUP_CHUNK)
        vectors = [lookup(self.ids[i * LOOKUP_CHUNK : (i + 1) * LOOKUP_CHUNK]) for i in range(chunks)]
        self.similarity = similarity
        self.items = similarity.items(torch.cat(vectors).float())

    def ranks(self, queries_BD: Tensor, batch: EvaluationBatch) -> Tensor:
        """float64 [B]: 1 is best, ties share their mean rank. Every rank passes as many queries."""
        queries = self._gather(queries_BD.float())
        targets = self._gather(batch.target_ids_B)
        column, mine = self._locate(targets)
        # The score of each target, and on how many ranks it was found, which is one.
        if isinstance(self.similarity, MixtureOfLogits):
            target_score = torch.zeros(len(targets), dtype=torch.float64, device=queries.device)
            own = self.similarity.pairs(queries[mine], self.items[column[mine]][:, None])[0].squeeze(1)
            target_score[mine] = own.double()
        else:
            target_score = target_scores(queries, self.items, torch.where(mine, column, -1)).double()
        owners = mine.double()
        self._sum(target_score)
        self._sum(owners)
        if len(unknown := targets[(owners == 0) & (targets > 0)]):  # 0 only fills up the batch
            raise DataError(f"target item {int(unknown[0])} is not in the corpus (items.parquet) of data.path")
        target, seen = target_score.to(queries.dtype), self._seen_places(batch)
        if isinstance(self.similarity, MixtureOfLogits):
            counts = self._mixture_counts(queries, target, seen, column, mine)
        else:
            counts = corpus_counts(queries, self.items, target, *seen).double()
        beaten_by = counts[:, 0] + 0.5 * counts[:, 1]
        # A NaN loses every comparison, which would look like a win for the target.
        beaten_by[counts[:, 2] > 0] = torch.nan
        self._sum(beaten_by)
        if beaten_by.isnan().any():
            raise TrainingError("scores are not finite: the model has diverged, there is nothing to rank")
        # The target ties with itself: that half is taken back.
        mean_rank = 1.0 + beaten_by - 0.5
        B = len(queries_BD)
        return mean_rank[self.world.rank * B : (self.world.rank + 1) * B]

    def top(self, queries_BD: Tensor, batch: EvaluationBatch, k: int) -> tuple[Tensor, Tensor]:
        """The k best items of each query that it has not seen: ids, int64 [B, k], and scores, float32 [B, k].

        Best first; of equal scores the smaller id. Where fewer are left, the score is minus infinity and the id 0.
        Every rank passes as many queries. Raises TrainingError where scores are not finite.
        """
        queries = self._gather(queries_BD.float())
        owner, place = self._seen_places(batch)
        blocks = []
        for first in range(0, max(len(queries), 1), QUERY_BLOCK):
            own = (owner >= first) & (owner < first + QUERY_BLOCK)
            blocks.append(self._top_of_slice(queries[first : first + QUERY_BLOCK], (owner[own] - first, place[own]), k))
        scores_QK, ids_QK = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        finite = not bool(scores_QK.isnan().any())
        if self.world.any(not finite):
            raise TrainingError("scores are not finite: the model has diverged, there is nothing to rank")
        if self.world.size > 1:
            B, first_query = len(queries_BD), self.world.rank * len(queries_BD)
            # [ranks, queries of all ranks, k] -> the candidates of this rank's queries.
            parts = [self._gather_parts(part)[:, first_query : first_query + B] for part in (scores_QK, ids_QK)]
            all_scores, all_ids = (part.transpose(0, 1).flatten(1) for part in parts)
            scores_QK, ids_QK = best(all_scores, all_ids, k)
        return ids_QK.masked_fill(scores_QK == -torch.inf, 0), scores_QK

    def _top_of_slice(self, queries: Tensor, seen: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
        """The result of `top` among the items of this rank alone: scores, where NaN is best, and ids."""
        scores_QK = queries.new_full((len(queries), k), -torch.inf)
        ids_QK = torch.zeros_like(scores_QK, dtype=torch.int64)
        for first, score in self._score_blocks(queries, seen, self._floor(queries, seen, k)):
            of_block = best(score, self.ids[first : first + score.shape[1]].expand_as(score), min(k, score.shape[1]))
            if first or score.shape[1] < k:
                of_block = best(torch.cat([scores_QK, of_block[0]], 1), torch.cat([ids_QK, of_block[1]], 1), k)
            scores_QK, ids_QK = of_block
        return scores_QK, ids_QK

    def _floor(self, queries: Tensor, seen: tuple[Tensor, Tensor], k: int) -> Tensor | None:
        """A score that the k-th best item of each query reaches, [Q]; None where scores are no mixtures."""
        if not isinstance(self.similarity, MixtureOfLogits):
            return None
        floor_Q = queries.new_full((len(queries),), -torch.inf)
        for first in range(0, len(self.ids), SCORE_BLOCK):
            items = self.items[first : first + SCORE_BLOCK]
            excluded = torch.zeros(len(queries), len(items), dtype=torch.bool, device=queries.device)
            excluded[self._inside(seen, first)] = True
            floor_Q = torch.maximum(floor_Q, self.similarity.floor(queries, items, excluded, k))
        return floor_Q

    def _mixture_counts(
        self, queries: Tensor, target_Q: Tensor, seen: tuple[Tensor, Tensor], column: Tensor, mine: Tensor
    ) -> Tensor:
        """Counts of mixtures, as gr.ops.corpus_counts has them of products: above, equal, NaN; float64 [Q, 3]."""
        counts = torch.zeros(len(queries), 3, dtype=torch.float64, device=queries.device)
        for first, score in self._score_blocks(queries, seen, target_Q):
            # The target's own score is as it is compared: other sums of the same numbers differ in last bits.
            inside = mine & (column >= first) & (column < first + score.shape[1])
            score[inside, column[inside] - first] = target_Q[inside]
            target = target_Q[:, None]
            counts += torch.stack([each.sum(1) for each in (score > target, score == target, score.isnan())], 1)
        return counts

    def _gather_parts(self, rows_QK: Tensor) -> Tensor:
        """rows_QK of every rank, [R, Q, K]."""
        return self._gather(rows_QK).unflatten(0, (self.world.size, -1))

    def _score_blocks(
        self, queries: Tensor, seen: tuple[Tensor, Tensor], floor_Q: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first column, scores [queries, at most SCORE_BLOCK]), seen items at minus infinity.

        floor_Q: mixtures below it may be minus infinity too.
        """
        for first in range(0, len(self.ids), SCORE_BLOCK):
            items = self.items[first : first + SCORE_BLOCK]
            score = self.similarity.scores(queries, items, floor_Q)
            score[self._inside(seen, first)] = -torch.inf
            yield first, score

    @staticmethod
    def _inside(seen: tuple[Tensor, Tensor], first: int) -> tuple[Tensor, Tensor]:
        """(query, column in the block that begins at `first`) of the seen items in it."""
        owner, place = seen
        inside = (place >= first) & (place < first + SCORE_BLOCK)
        return owner[inside], place[inside] - first

    def _locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each id in this rank's slice, and whether it is there."""
        if not len(self.ids):
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        column = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)
        return column, self.ids[column] == ids

    def _seen_places(self, batch: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """(query, column) of every seen item, over the queries of all ranks, that lies in this rank's slice."""
        lengths = self._gather(batch.seen_offsets.diff())
        seen = torch.cat(self.world.all_gather_variable(batch.seen_ids))
        owner = torch.arange(len(lengths), device=seen.device).repeat_interleave(lengths)
        column, mine = self._locate(seen)
        return owner[mine], column[mine]

    def _gather(self, rows: Tensor) -> Tensor:
        if self.world.size == 1:
            return rows
        out = rows.new_empty(self.world.size * len(rows), *rows.shape[1:])
        dist.all_gather_single(out, rows.contiguous())
        return out

    def _sum(self, values: Tensor) -> None:
        if self.world.size > 1:
            dist.all_reduce(values)

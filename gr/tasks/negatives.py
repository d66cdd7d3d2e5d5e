"""The items that a step compares its targets with. Draws depend on (seed, step, global token), never on the world size.

T tokens of this rank, S negatives a token, K distinct items looked up, C items in the corpus.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gr.batch import Movable, RetrievalBatch
from gr.config.retrieval import (
    SMALL_CORPUS,
    FullSoftmax,
    InBatchNegatives,
    PerPositionNegatives,
    RetrievalTaskConfig,
    SharedNegatives,
)
from gr.dist import World
from gr.errors import DataError

# Philox gives four 64-bit draws for each value of its counter.
DRAWS_PER_COUNTER = 4


@dataclass(frozen=True)
class Candidates(Movable):
    """The items of a step, each looked up once, and how the positions of this rank refer to them.

    ids_K: int64, distinct. positive_T: int64, index into ids_K of each position's target.
    negative_TS: int64, index into ids_K of each position's own negatives; None when all K items are compared with.
    shared_S: int64, index into ids_K of the negatives that all positions share, or None.
    log_q_K: float, log of the probability that an item is among the candidates, or None for a uniform draw.
    """

    ids_K: Tensor
    positive_T: Tensor
    negative_TS: Tensor | None = None
    shared_S: Tensor | None = None
    log_q_K: Tensor | None = None


class CandidateSampler:
    """Draws the candidates of each step.

    corpus_ids: int64 [C], ascending. corpus_counts: int64 [C], occurrences in training, for log Q.
    """

    def __init__(
        self, config: RetrievalTaskConfig, corpus_ids: np.ndarray, corpus_counts: np.ndarray, seed: int
    ) -> None:
        self.negatives = config.negatives
        self.seed = seed
        self.corpus_C = torch.tensor(corpus_ids, dtype=torch.int64)
        frequency = np.maximum(corpus_counts, 1).astype(np.float64)
        self.frequency_C = torch.from_numpy(frequency / frequency.sum())

    def draw(self, batch: RetrievalBatch, step: int, world: World, tokens_before: int) -> Candidates:
        """Candidates of one step, on the CPU. tokens_before: tokens of lower ranks; not used where the batch has
        first_token_B.
        """
        targets_T = batch.target_ids_T
        match self.negatives:
            case FullSoftmax():
                return Candidates(self.corpus_C, self._corpus_index(targets_T))
            case PerPositionNegatives(count=count):
                return self._per_position(targets_T, count, step, list(_runs(batch, tokens_before)))
            case SharedNegatives(count=count):
                return self._shared(targets_T, count, step)
            case InBatchNegatives():
                return self._in_batch(targets_T, world)

    def _per_position(self, targets_T: Tensor, count: int, step: int, runs: list[tuple[int, int]]) -> Candidates:
        C = len(self.corpus_C)
        key = (self.seed, 2 * step)
        drawn = [uniform_integers(key, C, start=first * count, count=tokens * count) for first, tokens in runs]
        drawn_TS = torch.cat(drawn).view(len(targets_T), count)
        if C <= SMALL_CORPUS:
            return Candidates(self.corpus_C, self._corpus_index(targets_T), drawn_TS)
        both = torch.cat([self._corpus_index(targets_T)[:, None], drawn_TS], dim=1)
        distinct_K, index = _distinct(both, C)
        return Candidates(self.corpus_C[distinct_K], index[:, 0], index[:, 1:].contiguous())

    def _shared(self, targets_T: Tensor, count: int, step: int) -> Candidates:
        drawn_S = uniform_integers((self.seed, 2 * step + 1), len(self.corpus_C), start=0, count=count)
        distinct_K, index = torch.cat([self._corpus_index(targets_T), drawn_S]).unique(return_inverse=True)
        return Candidates(self.corpus_C[distinct_K], index[: len(targets_T)], shared_S=index[len(targets_T) :])

    def _in_batch(self, targets_T: Tensor, world: World) -> Candidates:
        everyone = torch.cat(world.all_gather_variable(targets_T))
        if not len(everyone):  # no example of the global batch has a target; the softmax still needs an item
            everyone = self.corpus_C[:1]
        distinct_K = everyone.unique()
        # An item stands once among the candidates, however often it was drawn: Q is the probability of at least once.
        drawn = torch.log1p(-self.frequency_C[self._corpus_index(distinct_K)]) * len(everyone)
        log_q_K = torch.log(-torch.expm1(drawn)).float()
        return Candidates(distinct_K, torch.searchsorted(distinct_K, targets_T), log_q_K=log_q_K)

    def _corpus_index(self, ids: Tensor) -> Tensor:
        index = torch.searchsorted(self.corpus_C, ids).clamp_(max=len(self.corpus_C) - 1)
        if not torch.equal(self.corpus_C[index], ids):
            stranger = int(ids[self.corpus_C[index] != ids][0])
            raise DataError(f"target item {stranger} is not in the corpus (items.parquet); run `gr prepare` again")
        return index


def _distinct(index: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """The distinct values, ascending, and the place of each value among them, as torch.unique has them.

    index: int64, in [0, high). With as many values as there are numbers below `high`, marking those that occur costs a
    quarter of the hash table of torch.unique; with fewer, the marks cost more.
    """
    if high > index.numel():
        return index.unique(return_inverse=True)
    values = index.flatten()
    distinct_K = torch.zeros(high, dtype=torch.bool).index_fill_(0, values, True).nonzero().squeeze(1)
    place_C = torch.empty(high, dtype=torch.int64).index_copy_(0, distinct_K, torch.arange(len(distinct_K)))
    return distinct_K, place_C.index_select(0, values).view(index.shape)


def _runs(batch: RetrievalBatch, tokens_before: int) -> Iterator[tuple[int, int]]:
    """(number of the first token in the global batch, tokens) of each stretch of tokens that follow one another."""
    if batch.first_token_B is None:
        yield tokens_before, len(batch.target_ids_T)
        return
    start, stop = 0, 0
    for first, length in zip(batch.first_token_B.tolist(), batch.features.lengths().tolist(), strict=True):
        if length and first != stop:
            yield start, stop - start
            start = stop = first
        stop += length
    yield start, stop - start


def uniform_integers(key: tuple[int, int], high: int, *, start: int, count: int) -> Tensor:
    """int64 [count]: elements start .. start+count of the stream of uniform integers in [0, high) that `key` names."""
    skipped = start // DRAWS_PER_COUNTER
    generator = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)).advance(skipped))
    uniform = generator.random(start - skipped * DRAWS_PER_COUNTER + count)[start - skipped * DRAWS_PER_COUNTER :]
    return torch.from_numpy(np.minimum((uniform * high).astype(np.int64), high - 1))

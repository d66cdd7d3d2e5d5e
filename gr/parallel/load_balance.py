"""Deals the examples of each global batch to the ranks, so that each has as much to compute.

The global batch stays what the loaders made of it: examples change ranks, not steps. R ranks, B examples a rank, T
tokens.
"""

import heapq
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from gr.batch import Packed, RankingBatch, RetrievalBatch
from gr.data.collate import ranges
from gr.dist import World

Histories = TypeVar("Histories", RetrievalBatch, RankingBatch)


def deal(cost_N: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each example, int64 [N]: the dearest first, each to the rank that has the least so far.

    Every rank gets an example where there are as many.
    """
    owner_N = np.empty(len(cost_N), dtype=np.int64)
    least = [(0.0, 0, rank) for rank in range(ranks)]  # cost, and examples, which tell among empty ones
    for example in np.argsort(-cost_N, kind="stable").tolist():
        cost, examples, rank = least[0]
        owner_N[example] = rank
        heapq.heapreplace(least, (cost + float(cost_N[example]), examples + 1, rank))
    return owner_N


class LoadBalancer:
    """Exchanges the examples of a batch on the CPU. Every rank must call it, with as many examples.

    Afterwards ranks may differ in their number of examples, as tables for sequences, unlike pooled ones, allow.
    """

    def __init__(self, flops: Callable[[np.ndarray], np.ndarray], world: World) -> None:
        """flops: of examples by their lengths in tokens of the batch, int64 [N] -> float64 [N]."""
        self.flops, self.world = flops, world

    def __call__(self, batch: Histories) -> Histories:
        """This rank's examples of the global batch, in its order."""
        world, packed = self.world, batch.pack()
        lengths_RB = np.array(world.all_gather_ints(packed.lengths_B.tolist()))
        owner_RB = deal(self.flops(lengths_RB.ravel()), world.size).reshape(lengths_RB.shape)
        to_B, mine_RB = owner_RB[world.rank], owner_RB == world.rank
        mine_B, order_B = lengths_RB[world.rank], np.argsort(to_B, kind="stable")
        places_T = ranges((np.cumsum(mine_B) - mine_B)[order_B], mine_B[order_B])
        examples_BG = world.exchange_rows(
            packed.examples_BG[torch.from_numpy(order_B)],
            np.bincount(to_B, minlength=world.size).tolist(),
            mine_RB.sum(axis=1).tolist(),
        )
        tokens_TF = world.exchange_rows(
            packed.tokens_TF[torch.from_numpy(places_T)],
            np.bincount(to_B, mine_B, minlength=world.size).astype(np.int64).tolist(),
            (lengths_RB * mine_RB).sum(axis=1).tolist(),
        )
        first_RB = (np.cumsum(lengths_RB) - lengths_RB.ravel()).reshape(lengths_RB.shape)
        lengths_B, first_B = (torch.from_numpy(of_RB[mine_RB]) for of_RB in (lengths_RB, first_RB))
        return batch.unpack(Packed(lengths_B, examples_BG, tokens_TF, first_B))

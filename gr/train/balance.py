"""Deals the examples of each global batch to the ranks, so that each has as much to compute.

The global batch stays what the loaders made of it: examples change ranks, not steps. R ranks, B examples a rank, T
tokens.
"""

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gr.batch import Packed, SequenceBatch
from gr.dist import World


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


class Balance:
    """Exchanges the examples of a batch on the CPU. Every rank must call it, with as many examples.

    Afterwards ranks may differ in their number of examples, as tables for sequences, unlike pooled ones, allow.
    """

    def __init__(self, flops: Callable[[np.ndarray], np.ndarray], world: World) -> None:
        """flops: of examples by their lengths in tokens of the batch, int64 [N] -> float64 [N]."""
        self.flops, self.world = flops, world

    def __call__(self, batch: Any) -> Any:
        """batch: a SequenceBatch or a HistoryBatch. Returns this rank's examples of the global batch, in its order."""
        world, packed = self.world, batch.pack()
        lengths_RB = np.array(world.all_gather_ints(packed.lengths_B.tolist()))
        owner_RB = deal(self.flops(lengths_RB.ravel()), world.size).reshape(lengths_RB.shape)
        to_B, mine_RB = owner_RB[world.rank], owner_RB == world.rank
        order_B = torch.from_numpy(np.argsort(to_B, kind="stable"))
        examples_BG = world.exchange_rows(
            packed.examples_BG[order_B],
            np.bincount(to_B, minlength=world.size).tolist(),
            mine_RB.sum(axis=1).tolist(),
        )
        tokens_TF = world.exchange_rows(
            packed.tokens_TF[_tokens_of(packed.lengths_B, order_B)],
            np.bincount(to_B, lengths_RB[world.rank], minlength=world.size).astype(np.int64).tolist(),
            (lengths_RB * mine_RB).sum(axis=1).tolist(),
        )
        dealt = batch.unpack(Packed(torch.from_numpy(lengths_RB[mine_RB]), examples_BG, tokens_TF))
        if not isinstance(dealt, SequenceBatch):
            return dealt
        first_RB = (np.cumsum(lengths_RB) - lengths_RB.ravel()).reshape(lengths_RB.shape)
        return replace(dealt, first_token_B=torch.from_numpy(first_RB[mine_RB]))


def _tokens_of(lengths_B: torch.Tensor, order_B: torch.Tensor) -> torch.Tensor:
    """Places of the tokens of the examples order_B, one after the other."""
    before_B = (lengths_B.cumsum(0) - lengths_B)[order_B]
    taken_B = lengths_B[order_B]
    shift_B = before_B - (taken_B.cumsum(0) - taken_B)
    return shift_B.repeat_interleave(taken_B) + torch.arange(int(taken_B.sum()))

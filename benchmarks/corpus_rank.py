"""Ranks over a large corpus beside the matrix product alone: `python -m benchmarks.corpus_rank [--items N ...]`.

128 users, 200 seen items each, width 50. In turns and on one thread; medians of CPU seconds. The product is that of the
queries with all items, in blocks, whose scores are then dropped; `plain torch` makes it twice and counts in passes over
the scores. Before they are measured, the ranks of both are compared.
"""

import argparse

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from benchmarks.case import on_backend
from benchmarks.compare import compare, print_machine, report
from gr.batch import EvaluationBatch
from gr.dist import World
from gr.tasks import DotProduct
from gr.tasks.corpus_rank import CorpusRanker

USERS, SEEN, WIDTH, BLOCK = 128, 200, 50, 1 << 15


def batch_of(items: int, draw: torch.Generator) -> EvaluationBatch:
    targets_B = torch.randint(1, items + 1, (USERS,), generator=draw)
    seen = torch.randint(1, items + 1, (USERS, SEEN), generator=draw).sort(1).values
    kept = (seen != targets_B[:, None]) & (seen != seen.roll(1, 1))
    nothing = torch.empty(0, dtype=torch.int64)
    features = KeyedJaggedTensor(keys=["item_id"], values=nothing, lengths=torch.zeros(USERS, dtype=torch.int64))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return EvaluationBatch(features, None, None, targets_B, targets_B > 0, seen_ids=seen[kept], seen_offsets=offsets)


def product(queries_BD: Tensor, items_CD: Tensor) -> None:
    for first in range(0, len(items_CD), BLOCK):
        queries_BD @ items_CD[first : first + BLOCK].T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[4000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    for items in options.items:
        draw = torch.Generator().manual_seed(0)
        table = torch.randn(items + 1, WIDTH, generator=draw)
        alone = World(0, 1, 0, 1, torch.device("cpu"))
        ranker = CorpusRanker(torch.arange(1, items + 1), table.__getitem__, DotProduct(1.0), alone)
        queries_BD, batch = torch.randn(USERS, WIDTH, generator=draw), batch_of(items, draw)
        variants = {
            "the product alone": lambda q=queries_BD, r=ranker: product(q, r.items),
            "gr": on_backend("native", lambda q=queries_BD, r=ranker, b=batch: r.ranks(q, b)),
            "plain torch": on_backend("torch", lambda q=queries_BD, r=ranker, b=batch: r.ranks(q, b)),
        }
        apart = (variants["gr"]() - variants["plain torch"]()).abs().max()
        if apart > 1:  # a product of another shape rounds a score to other bits, which may turn over neighbours
            raise SystemExit(f"the ranks differ by {apart}, nothing is measured")
        timings = compare(variants, rounds=options.rounds)
        report(f"{items:,} items", timings, baseline="the product alone")


if __name__ == "__main__":
    main()

"""The retrieval index beside a matrix product with topk and beside faiss: `python -m benchmarks.retrieval_index`.

Item vectors lie around centres of very different sizes, as items of a catalogue do. In turns and on one thread; medians
of CPU milliseconds a query, ratios within a round. The probes of the inverted file are chosen on other queries than
those that its recall is then measured on.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.compare import print_machine
from gr.serving.index.approximate import build, faiss, recall_of
from gr.serving.index.exact import ExactIndex
from gr.serving.passes.retrieval_build import TUNING_QUERIES

WEIGHTS_OF_CENTRES = 1.0  # Zipf exponent


def clustered(items: int, queries: int, dim: int, centres: int, spread: float, between: bool) -> tuple[Tensor, Tensor]:
    """Items [E, D] and queries [B, D], float32, around the same centres.

    spread: of items around a centre, whose columns are standard normal. between: queries are means of two such points,
    which are far from every list of an inverted file.
    """
    draw = torch.Generator().manual_seed(0)
    centres_CD = torch.randn(centres, dim, generator=draw)
    weights_C = torch.arange(1, centres + 1).double() ** -WEIGHTS_OF_CENTRES

    def around(count: int) -> Tensor:
        centre = torch.multinomial(weights_C, count, replacement=True, generator=draw)
        return centres_CD[centre] + spread * torch.randn(count, dim, generator=draw)

    items_ED, queries_BD = around(items), around(queries)
    return items_ED, (queries_BD + around(queries)) / 2 if between else queries_BD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--recall", type=float, default=0.97)
    parser.add_argument("--centres", type=int, default=4000)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--between", action="store_true", help="queries between two centres")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    print(
        f"faiss {faiss().__version__}, {options.items:,} items x {options.dim}, spread {options.spread}, "
        f"the {options.k} best, queries {'between' if options.between else 'around'} centres"
    )
    sizes = options.items, 2 * TUNING_QUERIES + max(options.queries), options.dim, options.centres
    items_ED, queries_BD = clustered(*sizes, options.spread, options.between)
    tuning_BD, others_BD, queries_BD = queries_BD.tensor_split([TUNING_QUERIES, 2 * TUNING_QUERIES])
    exact = ExactIndex(torch.arange(1, options.items + 1), [items_ED])
    flat = faiss().IndexFlatIP(options.dim)
    flat.add(items_ED.numpy())
    began = time.process_time()
    inverted, measured = build(exact, tuning_BD, recall=options.recall, k=options.k)
    seconds = time.process_time() - began
    chosen = next(each for each in measured[::-1] if each.probes == inverted.probes)
    other = recall_of(inverted.top(others_BD, options.k)[0], exact.top(others_BD, options.k)[0])
    print(
        f"inverted file, {chosen.rows}: {chosen.lists} lists, {chosen.probes} probes, recall {chosen.recall:.4f} on "
        f"{TUNING_QUERIES} other queries, of others at least {chosen.least:.4f}; on {TUNING_QUERIES} more {other:.4f}; "
        f"built and tuned in {seconds:.1f} CPU s"
    )
    for B in options.queries:
        asked_BD = queries_BD[:B]
        variants: dict[str, Callable[[], Tensor]] = {
            "exact index": lambda asked_BD=asked_BD: exact.top(asked_BD, options.k)[0],
            "matmul + topk": lambda asked_BD=asked_BD: (asked_BD @ items_ED.T).topk(options.k, dim=1).indices + 1,
            "faiss flat": lambda asked_BD=asked_BD: torch.from_numpy(flat.search(asked_BD.numpy(), options.k)[1]) + 1,
            "inverted file": lambda asked_BD=asked_BD: inverted.top(asked_BD, options.k)[0],
        }
        _measure(B, variants, options.rounds)


def _measure(B: int, variants: dict[str, Callable[[], Tensor]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    ids: dict[str, Tensor] = {}
    for _ in range(rounds):
        for variant, run in variants.items():
            began = time.process_time()
            ids[variant] = run()
            seconds[variant].append(time.process_time() - began)
    ours = seconds["exact index"]
    print(f"\n{B} queries at once")
    for variant, measured in seconds.items():
        ratios = [theirs / own for own, theirs in zip(ours, measured, strict=True)]
        same = recall_of(ids[variant], ids["exact index"])
        print(
            f"{variant:14s} {1e3 * statistics.median(measured) / B:9.3f} CPU ms a query, "
            f"{statistics.median(ratios):6.2f} of the exact index, ids shared with it {same:.4f}"
        )
    against_flat = [f / i for f, i in zip(seconds["faiss flat"], seconds["inverted file"], strict=True)]
    print(f"inverted file: {statistics.median(against_flat):.1f} times faiss flat")


if __name__ == "__main__":
    main()

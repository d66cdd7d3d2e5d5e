"""The k best items through an inverted file of faiss: some lists of rows of 8 bits, then the exact scores of the best.

B queries, E items, D width, K results, C candidates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr.errors import InstallError, ServingError
from gr.ops.top_k import best
from gr.serving.index.exact import ExactIndex, Seen

TRAINING_ROWS_A_LIST = 64
LISTS_A_ROOT = 1.0  # lists for each square root of the number of items
RERANKED = 1.25  # candidates for each result, whose exact scores decide
NORMAL_95 = 1.645  # standard errors below a mean, above which the true mean lies in 95 of 100 samples
# One scale for all columns is scanned a tenth faster; one a column is for items whose columns differ much in size.
ROWS_OF_8_BITS = ("QT_8bit_uniform", "QT_8bit")


def faiss() -> ModuleType:
    """The library, on one thread: a worker of the server is one. Raises InstallError where it is not installed."""
    try:
        import faiss as library
    except ImportError:
        raise InstallError("an approximate index needs faiss: pip install 'gr[faiss]', or use index=exact") from None
    library.omp_set_num_threads(1)
    return library


@dataclass(frozen=True)
class Recall:
    """The share of the exact k best that come back when `probes` of the `lists` are searched.

    least: of other queries like these, with 95 % confidence. rows: how the lists store vectors, in faiss's words.
    """

    rows: str
    probes: int
    lists: int
    recall: float
    least: float
    k: int
    queries: int


class ApproximateIndex:
    """An inverted file beside the exact index, whose vectors decide among its candidates."""

    def __init__(self, exact: ExactIndex, lists: Any, probes: int) -> None:
        """lists: faiss's IndexIVF over the items in the order of their ids. probes: lists searched for a query."""
        if lists.ntotal != len(exact) or lists.d != exact.dim:
            raise ServingError(
                f"the inverted file has {lists.ntotal} items of width {lists.d}, the item vectors are {len(exact)} of "
                f"width {exact.dim}; export it again"
            )
        self.exact, self.lists, self.probes = exact, lists, probes
        lists.nprobe = probes

    def __len__(self) -> int:
        return len(self.exact)

    @torch.inference_mode()
    def top(self, queries_BD: Tensor, k: int, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
        """The same as ExactIndex.top, errors too, among the items in the lists searched; scores are exact."""
        self.exact.check(queries_BD, k)
        if not len(queries_BD):
            return self.exact.top(queries_BD, k)
        longest = 0 if seen is None else int(seen.offsets_B1.diff().max())
        C = min(math.ceil(RERANKED * k) + longest, len(self))
        _, places = self.lists.search(queries_BD.contiguous().numpy(), C)
        places_BC = torch.from_numpy(places)
        there_BC = places_BC >= 0  # faiss fills up with -1
        places_BC = places_BC.clamp(min=0)
        scores_BC = torch.einsum("bcd,bd->bc", self.exact.vectors(places_BC), queries_BD)
        ids_BC = self.exact.ids_E[places_BC]
        if seen is not None:
            there_BC &= ~_among(ids_BC, seen)
        scores_BC = scores_BC.masked_fill(~there_BC, -torch.inf)
        scores_BK, ids_BK = best(scores_BC, ids_BC, k)
        return ids_BK.masked_fill(scores_BK == -torch.inf, 0), scores_BK

    def save(self, path: Path) -> None:
        faiss().write_index(self.lists, str(path))


def _among(ids_BC: Tensor, seen: Seen) -> Tensor:
    """Whether a query has seen each of its candidates, bool [B, C]: both sides as one number of (query, id)."""
    B = len(ids_BC)
    stride = int(torch.cat([ids_BC.flatten(), seen.ids_S]).max()) + 1
    query_S = torch.arange(B).repeat_interleave(seen.offsets_B1.diff())
    return torch.isin(torch.arange(B)[:, None] * stride + ids_BC, query_S * stride + seen.ids_S)


def build(exact: ExactIndex, queries_BD: Tensor, *, recall: float, k: int) -> tuple[ApproximateIndex, list[Recall]]:
    """The inverted file with the fewest probes whose recall at k is at least `recall`, and all that was measured.

    It is to hold for other queries like queries_BD too, so what has to reach `recall` is Recall.least. Raises
    ServingError where even every list misses it, since rows of 8 bits put other items first.
    """
    expected_BK, _ = exact.top(queries_BD, k)
    measured: list[Recall] = []
    for rows in ROWS_OF_8_BITS:
        lists = _filled(exact, rows)

        def reaches(probes: int, rows: str = rows, lists: Any = lists) -> bool:
            ids_BK, _ = ApproximateIndex(exact, lists, probes).top(queries_BD, k)
            shares_B = _shares_of(ids_BK, expected_BK)
            mean, error = float(shares_B.mean()), float(shares_B.std()) / len(shares_B) ** 0.5
            least = mean - NORMAL_95 * error
            measured.append(Recall(rows, probes, lists.nlist, mean, least, k, len(shares_B)))
            return least >= recall

        if (probes := _fewest(reaches, lists.nlist)) is not None:
            return ApproximateIndex(exact, lists, probes), measured
    last = measured[-1]
    raise ServingError(
        f"the approximate index reaches recall {last.recall:.4f} at {k} with all {last.lists} lists, {last.least:.4f} "
        f"less a margin for only {last.queries} queries, below {recall}; lower the recall asked for, or use index=exact"
    )


def _fewest(reaches: Callable[[int], bool], most: int) -> int | None:
    """The smallest number up to `most` that reaches, as all above it do; None where `most` does not."""
    high = 1
    while not reaches(high):
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _filled(exact: ExactIndex, rows: str) -> Any:
    """faiss's IndexIVF of all items. rows: one of ROWS_OF_8_BITS."""
    library = faiss()
    count = max(1, round(LISTS_A_ROOT * len(exact) ** 0.5))
    kind = getattr(library.ScalarQuantizer, rows)
    quantizer = library.IndexFlatIP(exact.dim)
    lists = library.IndexIVFScalarQuantizer(quantizer, exact.dim, count, kind, library.METRIC_INNER_PRODUCT)
    draw = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(exact), generator=draw)[: TRAINING_ROWS_A_LIST * count].sort().values
    lists.train(exact.vectors(sample).numpy())
    for shard in exact.shards:
        lists.add(shard.contiguous().numpy())
    return lists


def load(exact: ExactIndex, path: Path, probes: int) -> ApproximateIndex:
    """The index that `save` wrote; the package's checksum has been compared before."""
    return ApproximateIndex(exact, faiss().read_index(str(path)), probes)


def recall_of(ids_BK: Tensor, expected_BK: Tensor) -> float:
    """The share of the expected ids that are among those of the same query."""
    return float(_shares_of(ids_BK, expected_BK).mean())


def _shares_of(ids_BK: Tensor, expected_BK: Tensor) -> np.ndarray:
    """The same of each query, [B]."""
    pairs = zip(ids_BK.numpy(), expected_BK.numpy(), strict=True)
    return np.array([len(np.intersect1d(got, right)) / len(right) for got, right in pairs])

"""Similarity of queries and items: dot product, cosine, or a learned mixture of logits.

T queries, K items, D width; P components of a mixture, of width d each; N pairs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.config.retrieval import MixtureConfig, RetrievalTaskConfig, SimilarityConfig
from gr.errors import ConfigError
from gr.ops.dropout import dropout

NORM_EPS = 1e-6
PAIR_FLOATS = 1 << 24  # of the components of pairs of queries and items that are in memory together


class Similarity(ABC):
    """Maps both sides to vectors, of which scores are computed: scale * (query . item), but for a mixture."""

    scale: float

    @abstractmethod
    def queries(self, x_TD: Tensor) -> Tensor:
        """The vectors of queries, [T, C]."""

    @abstractmethod
    def items(self, x_KD: Tensor) -> Tensor:
        """The vectors of items, [K, C]."""

    def scores(self, queries_TD: Tensor, items_KD: Tensor, floor_T: Tensor | None = None) -> Tensor:
        """Float [T, K] of what queries, times `scale`, and items have made. Those below floor_T may be minus infinity
        where that saves work.
        """
        return queries_TD @ items_KD.T


@dataclass(frozen=True)
class DotProduct(Similarity):
    """score = query . item / temperature."""

    scale: float

    def queries(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def items(self, x_KD: Tensor) -> Tensor:
        return x_KD


@dataclass(frozen=True)
class Cosine(Similarity):
    """score = cos(query, item) / temperature."""

    scale: float

    def queries(self, x_TD: Tensor) -> Tensor:
        return F.normalize(x_TD, dim=-1, eps=NORM_EPS)

    def items(self, x_KD: Tensor) -> Tensor:
        return F.normalize(x_KD, dim=-1, eps=NORM_EPS)


class MixtureOfLogits(nn.Module, Similarity):
    """score = sum over p of pi_p(query, item) * l_p, l_p = cos(f_p(query), g_p(item)) / temperature.

    P = query_vectors * item_vectors logits, one for each pair of a vector of the query and one of the item. The gates
    pi are a softmax of SiLU(gate of the query * gate of the item + gate of the logits), so a score lies between the
    least and the greatest of its logits (arXiv 2306.04039; arXiv 2407.15462). A query and an item become one
    vector each: their vectors one after another, then their gate, [P].
    """

    scale = 1.0  # the temperature is in the logits

    def __init__(self, config: MixtureConfig, dim: int, temperature: float) -> None:
        super().__init__()
        self.config, self.temperature = config, temperature
        P = config.query_vectors * config.item_vectors
        self.query_vectors = nn.Linear(dim, config.query_vectors * config.dim)
        self.item_vectors = nn.Linear(dim, config.item_vectors * config.dim)
        self.query_gate, self.item_gate, self.logit_gate = (_gate(n, config.hidden, P) for n in (dim, dim, P))

    def queries(self, x_TD: Tensor) -> Tensor:
        return self._vectors_and_gate(x_TD, self.query_vectors, self.query_gate)

    def items(self, x_KD: Tensor) -> Tensor:
        return self._vectors_and_gate(x_KD, self.item_vectors, self.item_gate)

    def scores(self, queries_TC: Tensor, items_KC: Tensor, floor_T: Tensor | None = None) -> Tensor:
        """Float [T, K]; of pairs that certainly lie below floor_T minus infinity.

        A pair whose greatest logit lies below the floor does so itself, so no gates are computed for it.
        """
        scores_TK = queries_TC.new_full((len(queries_TC), len(items_KC)), -torch.inf)
        for part, logits_tKP in self._logits_by_queries(queries_TC, items_KC):
            upper_tK = logits_tKP.amax(2)
            if floor_T is None:
                chosen_tK = torch.ones_like(upper_tK, dtype=torch.bool)
            else:
                chosen_tK = ~(upper_tK < floor_T[part, None] - self._rounding)  # true for NaN, which is for others
            query_N, item_N = chosen_tK.nonzero(as_tuple=True)
            for few in torch.arange(len(query_N), device=query_N.device).split(self._pairs_at_once):
                query_n, item_n = query_N[few], item_N[few]
                gates_nP = self._gates(
                    queries_TC[part][query_n, -self.P :], items_KC[item_n, -self.P :], logits_tKP[query_n, item_n]
                )
                scores_TK[part][query_n, item_n] = (gates_nP * logits_tKP[query_n, item_n]).sum(1)
        return scores_TK

    def floor(self, queries_TC: Tensor, items_KC: Tensor, excluded_TK: Tensor, k: int) -> Tensor:
        """A score that the k-th best item of each query has or exceeds, [T]; minus infinity of fewer than k items.

        It is the least score of the k items whose greatest logits are greatest (arXiv 2407.15462, the first of two
        passes). excluded_TK: bool, pairs that are no candidates.
        """
        floors = [queries_TC.new_empty(0)]
        for part, logits_tKP in self._logits_by_queries(queries_TC, items_KC):
            upper_tK = logits_tKP.amax(2).masked_fill_(excluded_TK[part], -torch.inf)
            best_tk = upper_tK.topk(min(k, len(items_KC)), dim=1)
            place_tkP = best_tk.indices[..., None].expand(-1, -1, self.P)
            logits_tkP = logits_tKP.gather(1, place_tkP)
            gates_tkP = self._gates(
                queries_TC[part][:, None, -self.P :], items_KC[best_tk.indices, -self.P :], logits_tkP
            )
            scores_tk = (gates_tkP * logits_tkP).sum(2).masked_fill(best_tk.values == -torch.inf, -torch.inf)
            least_t = scores_tk.amin(1)
            floors.append(least_t if len(items_KC) >= k else torch.full_like(least_t, -torch.inf))
        return torch.cat(floors)

    def pairs(self, queries_NC: Tensor, *items: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of S items for each of N queries, float [N, S], and the load-balance loss of each query, [N].

        items: one after another, those of each query, [N, S, C], or those of all of them, [S, C], which are not copied
        for each. The loss is minus the mutual information, in nats, of component and item among a query's items (arXiv
        2407.15462 has it over a batch; over one query it is the same at every world size): gates that are
        sharp for an item, and differ between items.
        """
        parts = [self._logits(queries_NC, part[..., : -self.P]) for part in items]
        query_gate_N1P = queries_NC[:, None, -self.P :]
        gates = [
            self._gates(query_gate_N1P, part[..., -self.P :], logits) for part, logits in zip(items, parts, strict=True)
        ]
        logits_NSP, gates_NSP = torch.cat(parts, 1), torch.cat(gates, 1)
        balance_N = _entropy(gates_NSP).mean(1) - _entropy(gates_NSP.mean(1))
        dropped_NSP = dropout(gates_NSP, self.config.dropout, self.training)
        if self.training and self.config.dropout:
            dropped_NSP = dropped_NSP / dropped_NSP.sum(2, keepdim=True).clamp(min=NORM_EPS)
        return (dropped_NSP * logits_NSP).sum(2), balance_N

    @property
    def P(self) -> int:
        return self.config.query_vectors * self.config.item_vectors

    @property
    def pair_floats(self) -> int:
        """The floats that a pair takes: the item's vectors and gate, logits, gates and the hidden layer."""
        return self.config.item_vectors * self.config.dim + 4 * self.P + self.config.hidden

    @property
    def _pairs_at_once(self) -> int:
        return max(1, PAIR_FLOATS // self.pair_floats)

    @property
    def _rounding(self) -> float:
        """More than what a score in float32 can exceed the greatest of its logits by."""
        return 1e-4 / self.temperature

    def _vectors_and_gate(self, x: Tensor, vectors: nn.Linear, gate: nn.Module) -> Tensor:
        parts = vectors(x).unflatten(-1, (-1, self.config.dim))
        root = self.temperature**-0.5  # of either side, so that their products are divided by the temperature
        return torch.cat([F.normalize(parts, dim=-1, eps=NORM_EPS).flatten(-2) * root, gate(x)], -1)

    def _gates(self, query_gate: Tensor, item_gate: Tensor, logits: Tensor) -> Tensor:
        return F.silu(query_gate * item_gate + self.logit_gate(logits)).softmax(-1)

    def _logits(self, queries_NC: Tensor, theirs: Tensor) -> Tensor:
        """[N, S, P]. theirs: the vectors of items, [S, m d] or [N, S, m d]."""
        n, m, d = self.config.query_vectors, self.config.item_vectors, self.config.dim
        S, own = theirs.shape[-2], queries_NC[:, : -self.P]
        if theirs.ndim == 2:
            products_NnSm = (own.reshape(-1, d) @ theirs.reshape(S * m, d).T).view(-1, n, S, m)
        else:
            products_NnSm = (own.view(-1, n, d) @ theirs.reshape(-1, S * m, d).transpose(1, 2)).view(-1, n, S, m)
        return products_NnSm.transpose(1, 2).flatten(2)

    def _logits_by_queries(self, queries_TC: Tensor, items_KC: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(some queries, their logits [t, K, P])."""
        at_once = max(1, PAIR_FLOATS // max(1, len(items_KC) * self.P))
        vectors = items_KC[:, : -self.P].contiguous()  # once, and not for each block of queries
        for first in range(0, len(queries_TC), at_once):
            part = slice(first, min(first + at_once, len(queries_TC)))
            yield part, self._logits(queries_TC[part], vectors)


def _gate(inputs: int, hidden: int, P: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, P))


def _entropy(p: Tensor) -> Tensor:
    """In nats, over the last dimension. A probability that has underflowed to 0 has a gradient too."""
    return -(p * (p + NORM_EPS).log()).sum(-1)


def require_product(similarity: Similarity, what: str) -> None:
    """Raises ConfigError where a score is no product of two vectors, which `what` needs."""
    if isinstance(similarity, MixtureOfLogits):
        raise ConfigError(
            f"{what} needs scores that are products of two vectors, and this model has task.similarity.kind=mol: use "
            "`gr recommend`, or train without task.similarity"
        )


def build_similarity(config: SimilarityConfig, dim: int) -> Similarity:
    """dim: D of both sides."""
    if isinstance(config, RetrievalTaskConfig) and config.similarity is not None:
        return MixtureOfLogits(config.similarity, dim, config.temperature)
    return (Cosine if config.l2_norm else DotProduct)(1.0 / config.temperature)

"""Similarity of queries and items. A learned similarity (mixture of logits) is another class of the same shape.

T queries, K items, D width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from gr.config.retrieval import SimilarityConfig

NORM_EPS = 1e-6


class Similarity(Protocol):
    """Maps both sides into one space where score = scale * (query . item)."""

    @property
    def scale(self) -> float: ...

    def queries(self, x_TD: Tensor) -> Tensor: ...

    def items(self, x_KD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DotProduct:
    """score = query . item / temperature."""

    scale: float

    def queries(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def items(self, x_KD: Tensor) -> Tensor:
        return x_KD


@dataclass(frozen=True)
class Cosine:
    """score = cos(query, item) / temperature."""

    scale: float

    def queries(self, x_TD: Tensor) -> Tensor:
        return F.normalize(x_TD, dim=-1, eps=NORM_EPS)

    def items(self, x_KD: Tensor) -> Tensor:
        return F.normalize(x_KD, dim=-1, eps=NORM_EPS)


def build_similarity(config: SimilarityConfig) -> Similarity:
    return (Cosine if config.l2_norm else DotProduct)(1.0 / config.temperature)

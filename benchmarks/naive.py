"""The naive baseline: the same HSTU retriever in plain padded PyTorch, as one would write it from the paper.

B examples, N padded length, D width, S negatives, E items. Same maths as gr with position bias, constant divisor,
cosine similarity and per-position uniform negatives; the tests compare its loss with gr's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NaiveLayer(nn.Module):
    def __init__(self, dim: int, max_length: int, dropout: float, divisor: float) -> None:
        super().__init__()
        self.dropout, self.divisor, self.max_length = dropout, divisor, max_length
        self.uvqk = nn.Parameter(torch.randn(dim, 4 * dim) * 0.02)
        self.output = nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.randn(2 * max_length - 1) * 0.02)

    def forward(self, x_BND: Tensor) -> Tensor:
        N = x_BND.shape[1]
        u, v, q, k = F.silu(F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-6) @ self.uvqk).chunk(4, dim=-1)
        place = torch.arange(N, device=x_BND.device)
        bias_NN = self.position_bias[(place[None] - place[:, None]) + self.max_length - 1]
        scores_BNN = F.silu(torch.einsum("bnd,bmd->bnm", q, k) + bias_NN) / self.divisor
        scores_BNN = scores_BNN * torch.ones(N, N, device=x_BND.device).tril()
        a = F.layer_norm(torch.einsum("bnm,bmd->bnd", scores_BNN, v), v.shape[-1:], eps=1e-6)
        return x_BND + self.output(F.dropout(u * a, self.dropout, self.training))


class NaiveRetriever(nn.Module):
    """Padded from end to end; negatives gathered to [tokens, S, D]."""

    def __init__(
        self, items: int, dim: int, max_length: int, *, layers: int = 2, dropout: float = 0.2, divisor: float = 211.0
    ) -> None:
        super().__init__()
        self.dim, self.dropout = dim, dropout
        self.items = nn.Embedding(items, dim, padding_idx=0)
        nn.init.trunc_normal_(self.items.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(max_length, dim) * 0.09)
        self.layers = nn.ModuleList(NaiveLayer(dim, max_length, dropout, divisor) for _ in range(layers))

    def forward(self, ids_BN: Tensor, targets_BN: Tensor, negatives_BNS: Tensor, temperature: float) -> Tensor:
        """Mean -log p(target) over the positions with an item (id 0 is padding), nats."""
        x = self.items(ids_BN) * self.dim**0.5 + self.position
        x = F.dropout(x, self.dropout, self.training) * (ids_BN > 0)[..., None]
        for layer in self.layers:
            x = layer(x) * (ids_BN > 0)[..., None]
        keep = ids_BN > 0
        queries = F.normalize(x[keep], dim=-1, eps=1e-6)
        targets, negatives = targets_BN[keep], negatives_BNS[keep]
        positive = (queries * F.normalize(self.items(targets), dim=-1, eps=1e-6)).sum(-1, keepdim=True)
        vectors_TSD = F.normalize(self.items(negatives), dim=-1, eps=1e-6)
        logits = torch.einsum("td,tsd->ts", queries, vectors_TSD).masked_fill(negatives == targets[:, None], -5e4)
        return F.cross_entropy(torch.cat([positive, logits], dim=1) / temperature, torch.zeros_like(targets))

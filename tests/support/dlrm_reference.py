"""DLRM as published, in plain PyTorch and with loops: nothing of the model is taken from gr.

Names and order are those of facebookresearch/dlrm (dlrm_s_pytorch.py, DLRM_Net): emb_l, v_W_l where rows have weights,
bot_l, top_l; the dot products of the lower triangle, row by row; a sigmoid at the end. The cross network is arXiv
2008.13535, Eq. 4, with a low-rank matrix; the projection is torchrec's DLRM_Projection written out. Initial weights are
published too, the cross network's biases excepted, which would be zero and hide mistakes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr.config.dlrm import DLRMConfig
from gr.config.inventory import TableConfig

Bags = Sequence[Sequence[Sequence[int]]]  # [table][example] -> ids


@dataclass(frozen=True)
class Shape:
    """What the model is made of; `pairs` is dot, dot_itself, cat, dcn or projection."""

    rows: tuple[int, ...]
    dense_features: int
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    pairs: str
    layers: int = 2
    rank: int = 3
    branch1: tuple[int, ...] = ()
    branch2: tuple[int, ...] = ()
    row_weights: bool = False


class ReferenceDLRM(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        vectors = len(shape.rows) + 1
        flat = vectors * shape.dim
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(n, shape.dim, mode="sum") for n in shape.rows)
        if shape.row_weights:  # --weighted-pooling learned
            self.v_W_l = nn.ParameterList(torch.ones(n) for n in shape.rows)
        self.bot_l = relu_layers(shape.dense_features, shape.bottom)
        width = flat
        if shape.pairs == "dot":
            width = shape.dim + vectors * (vectors - 1) // 2
        elif shape.pairs == "dot_itself":
            width = shape.dim + vectors * (vectors + 1) // 2
        elif shape.pairs == "dcn":
            std = math.sqrt(2 / (flat + shape.rank))
            self.cross_v = nn.ParameterList(torch.randn(shape.rank, flat) * std for _ in range(shape.layers))
            self.cross_w = nn.ParameterList(torch.randn(flat, shape.rank) * std for _ in range(shape.layers))
            self.cross_b = nn.ParameterList(torch.randn(flat) * 0.1 for _ in range(shape.layers))
        elif shape.pairs == "projection":
            self.branch_1 = relu_layers(flat, shape.branch1)
            self.branch_2 = relu_layers(flat, shape.branch2)
            width = shape.dim + shape.branch1[-1] // shape.dim * (shape.branch2[-1] // shape.dim)
        self.top_l = relu_layers(width, shape.top)
        self.top_l[-1] = nn.Sigmoid()
        for module in self.modules():
            if isinstance(module, nn.EmbeddingBag):
                nn.init.uniform_(module.weight, -math.sqrt(1 / len(module.weight)), math.sqrt(1 / len(module.weight)))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / sum(module.weight.shape)))
                nn.init.normal_(module.bias, std=math.sqrt(1 / len(module.bias)))

    def forward(self, dense: Tensor, bags: Bags) -> Tensor:
        """Probability of each example."""
        x = self.bot_l(dense)
        vectors = [x]
        for k, (table, examples) in enumerate(zip(self.emb_l, bags, strict=True)):
            ids = torch.tensor([i for example in examples for i in example], dtype=torch.int64)
            starts = [sum(len(example) for example in examples[:b]) for b in range(len(examples))]
            weights = self.v_W_l[k][ids] if self.shape.row_weights else None
            vectors.append(table(ids, torch.tensor(starts), per_sample_weights=weights))
        return self.top_l(self.interact(vectors)).squeeze(1)

    def interact(self, vectors: list[Tensor]) -> Tensor:
        x, shape = vectors[0], self.shape
        if shape.pairs in ("dot", "dot_itself"):
            products = []
            for i in range(len(vectors)):
                for j in range(i + 1 if shape.pairs == "dot_itself" else i):
                    products.append((vectors[i] * vectors[j]).sum(dim=1, keepdim=True))
            return torch.cat([x, *products], dim=1)
        flat = torch.cat(vectors, dim=1)
        if shape.pairs == "cat":
            return flat
        if shape.pairs == "dcn":
            crossed = flat
            for v, w, b in zip(self.cross_v, self.cross_w, self.cross_b, strict=True):
                crossed = flat * (crossed @ v.T @ w.T + b) + crossed
            return crossed
        # Row f of Y and column g of Z: the second branch's output is a matrix of D rows.
        D = shape.dim
        y, z = self.branch_1(flat), self.branch_2(flat)
        columns = z.shape[1] // D
        products = [
            (y[:, f * D : (f + 1) * D] * z[:, g::columns]).sum(dim=1, keepdim=True)
            for f in range(y.shape[1] // D)
            for g in range(columns)
        ]
        return torch.cat([x, *products], dim=1)


def relu_layers(width: int, layers: Sequence[int]) -> nn.Sequential:
    steps: list[nn.Module] = []
    for out in layers:
        steps += [nn.Linear(width, out), nn.ReLU()]
        width = out
    return nn.Sequential(*steps)


def random_bags(rows: Sequence[int], batch: int, longest: int, seed: int) -> list[list[list[int]]]:
    """Bags of 0 to `longest` ids, with repeats; the first example's are all empty."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(rows), batch), generator=random)
    lengths[:, 0] = 0
    return [
        [torch.randint(0, n, (int(length),), generator=random).tolist() for length in lengths[k]]
        for k, n in enumerate(rows)
    ]


def tables_for(config: DLRMConfig, rows: Mapping[str, int]) -> list[TableConfig]:
    """A table of so many rows for each feature, as `config` stores them."""
    kind, dim = config.table_layout
    return [TableConfig(name=name, rows=count, dim=dim, kind=kind) for name, count in rows.items()]

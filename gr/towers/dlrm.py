"""The dense parts of DLRM (arXiv 1906.00091): MLPs and feature interactions.

B examples, F tables, T = F + 1 vectors an example (the dense one x first; F and no x without dense features), D their
width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.config.dlrm import CatInteraction, DCNInteraction, DLRMConfig, DotInteraction, ProjectionInteraction


class NormalLinear(nn.Linear):
    """Starts from W ~ N(0, 2 / (in + out)) and b ~ N(0, 1 / out), as facebookresearch/dlrm does."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(2 / (self.in_features + self.out_features)))
        nn.init.normal_(self.bias, std=math.sqrt(1 / self.out_features))


class MLP(nn.Sequential):
    """Linear maps, each followed by ReLU; `logit` leaves it out after the last."""

    def __init__(self, width: int, layers: Sequence[int], *, linear: type[nn.Linear], logit: bool = False) -> None:
        steps: list[nn.Module] = []
        for into, out in pairwise((width, *layers)):
            steps += [linear(into, out), nn.ReLU()]
        super().__init__(*(steps[:-1] if logit else steps))


class Dot(nn.Module):
    """[x, <v_i, v_j> for i < j], row by row of the upper triangle; `self_interaction` takes the diagonal too.

    torchrec has the same order. facebookresearch/dlrm goes through the lower one (gr.models.convert.facebook_dlrm).
    """

    def __init__(self, vectors: int, dim: int, *, self_interaction: bool, dense: bool) -> None:
        super().__init__()
        self.dense, self.diagonal = dense, 0 if self_interaction else 1
        self.width = dense * dim + vectors * (vectors + 1 - 2 * self.diagonal) // 2

    def forward(self, vectors_BTD: Tensor) -> Tensor:
        T = vectors_BTD.shape[1]
        products_BTT = torch.bmm(vectors_BTD, vectors_BTD.mT)
        # Not a buffer: TorchRec fills buffers that were built on meta with zeros.
        i, j = torch.triu_indices(T, T, self.diagonal, device=vectors_BTD.device)
        pairs = products_BTT.flatten(1).index_select(1, i * T + j)
        return torch.cat([vectors_BTD[:, 0], pairs], dim=1) if self.dense else pairs


class Cat(nn.Module):
    """[x, v_1, ..., v_F]."""

    def __init__(self, vectors: int, dim: int) -> None:
        super().__init__()
        self.width = vectors * dim

    def forward(self, vectors_BTD: Tensor) -> Tensor:
        return vectors_BTD.flatten(1)


class CrossLayer(nn.Module):
    """x_0 * (W V x + b) + x, with V of shape [rank, width] and W of shape [width, rank] (arXiv 2008.13535, Eq. 4)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(rank, width))
        self.w = nn.Parameter(torch.empty(width, rank))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.v)
        nn.init.xavier_normal_(self.w)
        nn.init.zeros_(self.bias)

    def forward(self, x_0: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(x, x_0, F.linear(F.linear(x, self.v), self.w, self.bias))


class CrossNet(nn.Module):
    """DCN-v2's cross network over [x, v_1, ..., v_F]."""

    def __init__(self, vectors: int, dim: int, config: DCNInteraction) -> None:
        super().__init__()
        self.width = vectors * dim
        self.layers = nn.ModuleList(CrossLayer(self.width, config.rank) for _ in range(config.layers))

    def forward(self, vectors_BTD: Tensor) -> Tensor:
        x = x_0 = vectors_BTD.flatten(1)
        for layer in self.layers:
            x = layer(x_0, x)
        return x


class Projection(nn.Module):
    """[x, Y Z]: one MLP over all vectors gives Y of shape [F1, D], another Z of shape [D, F2]."""

    def __init__(
        self, vectors: int, dim: int, config: ProjectionInteraction, *, linear: type[nn.Linear], dense: bool
    ) -> None:
        super().__init__()
        self.dim, self.dense = dim, dense
        self.branch1 = MLP(vectors * dim, config.branch1, linear=linear)
        self.branch2 = MLP(vectors * dim, config.branch2, linear=linear)
        self.width = dense * dim + (config.branch1[-1] // dim) * (config.branch2[-1] // dim)

    def forward(self, vectors_BTD: Tensor) -> Tensor:
        flat = vectors_BTD.flatten(1)
        left = self.branch1(flat).unflatten(1, (-1, self.dim))
        right = self.branch2(flat).unflatten(1, (self.dim, -1))
        products = torch.bmm(left, right).flatten(1)
        return torch.cat([vectors_BTD[:, 0], products], dim=1) if self.dense else products


def mlp_linear(config: DLRMConfig) -> type[nn.Linear]:
    """The linear map with the initial weights that `config.mlp_init` names."""
    return NormalLinear if config.mlp_init == "normal" else nn.Linear


def build_interaction(config: DLRMConfig, vectors: int) -> Dot | Cat | CrossNet | Projection:
    """float [B, vectors, D] -> float [B, width], on the default device. The dense vector is first, if there is one."""
    dense = config.bottom is not None
    match config.interaction:
        case DotInteraction(self_interaction=self_interaction):
            return Dot(vectors, config.dim, self_interaction=self_interaction, dense=dense)
        case CatInteraction():
            return Cat(vectors, config.dim)
        case DCNInteraction() as dcn:
            return CrossNet(vectors, config.dim, dcn)
        case ProjectionInteraction() as projection:
            return Projection(vectors, config.dim, projection, linear=mlp_linear(config), dense=dense)

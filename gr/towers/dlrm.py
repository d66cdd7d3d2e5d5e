"""The dense parts of DLRM (arXiv 1906.00091): MLPs and feature interactions.

B examples, F vectors of tables an example, T = F + 1 with the dense one x, which is the first (F without dense
features), D their width. An interaction takes x, [B, D] or None, and the others, [B, F, D].
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.config.dlrm import CatInteraction, DCNInteraction, DLRMConfig, DotInteraction, ProjectionInteraction
from gr.ops.dot_interaction import dot_interaction, dot_interaction_reference


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
    portable: set where the module is exported; torch alone computes it then, compiled or not, to the same bits.
    """

    portable = False

    def __init__(self, vectors: int, dim: int, *, self_interaction: bool, dense: bool) -> None:
        super().__init__()
        self.diagonal = 0 if self_interaction else 1
        self.width = dense * dim + vectors * (vectors + 1 - 2 * self.diagonal) // 2

    def forward(self, dense_BD: Tensor | None, vectors_BFD: Tensor) -> Tensor:
        if self.portable:
            return dot_interaction_reference(dense_BD, vectors_BFD, self.diagonal)
        return dot_interaction(dense_BD, vectors_BFD, diagonal=self.diagonal)


class Cat(nn.Module):
    """[x, v_1, ..., v_F]."""

    def __init__(self, vectors: int, dim: int) -> None:
        super().__init__()
        self.width = vectors * dim

    def forward(self, dense_BD: Tensor | None, vectors_BFD: Tensor) -> Tensor:
        return _flat(dense_BD, vectors_BFD)


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

    def forward(self, dense_BD: Tensor | None, vectors_BFD: Tensor) -> Tensor:
        x = x_0 = _flat(dense_BD, vectors_BFD)
        for layer in self.layers:
            x = layer(x_0, x)
        return x


class Projection(nn.Module):
    """[x, Y Z]: one MLP over all vectors gives Y of shape [F1, D], another Z of shape [D, F2]."""

    def __init__(
        self, vectors: int, dim: int, config: ProjectionInteraction, *, linear: type[nn.Linear], dense: bool
    ) -> None:
        super().__init__()
        self.dim = dim
        self.branch1 = MLP(vectors * dim, config.branch1, linear=linear)
        self.branch2 = MLP(vectors * dim, config.branch2, linear=linear)
        self.width = dense * dim + (config.branch1[-1] // dim) * (config.branch2[-1] // dim)

    def forward(self, dense_BD: Tensor | None, vectors_BFD: Tensor) -> Tensor:
        flat = _flat(dense_BD, vectors_BFD)
        left = self.branch1(flat).unflatten(1, (-1, self.dim))
        right = self.branch2(flat).unflatten(1, (self.dim, -1))
        products = torch.bmm(left, right).flatten(1)
        return products if dense_BD is None else torch.cat([dense_BD, products], dim=1)


def _flat(dense_BD: Tensor | None, vectors_BFD: Tensor) -> Tensor:
    """All vectors side by side, [B, T x D]."""
    flat = vectors_BFD.flatten(1)
    return flat if dense_BD is None else torch.cat([dense_BD, flat], dim=1)


def mlp_linear(config: DLRMConfig) -> type[nn.Linear]:
    """The linear map with the initial weights that `config.mlp_init` names."""
    return NormalLinear if config.mlp_init == "normal" else nn.Linear


def build_interaction(config: DLRMConfig, vectors: int) -> Dot | Cat | CrossNet | Projection:
    """The interaction of `vectors` vectors in all: x and float [B, F, D] -> float [B, width], on the default device."""
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

"""DLRM (arXiv 1906.00091): its tables' width and its dense part, as a user configures them. No torch."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gr.config.base import Count, Section
from gr.config.towers import TowerCost

ROW_MULTIPLE = 4  # fbgemm asserts that a row is a multiple of 4 elements wide


def stored_dim(dim: int) -> int:
    """Columns a table of width `dim` takes: the columns past `dim` are zero and stay zero."""
    return -(-dim // ROW_MULTIPLE) * ROW_MULTIPLE


Widths = Annotated[tuple[Count, ...], Field(min_length=1)]


class DotInteraction(Section):
    """Dot products of all pairs of vectors, beside the dense vector (arXiv 1906.00091, section 2.1.3)."""

    kind: Literal["dot"] = "dot"
    self_interaction: bool = Field(False, description="Also the product of each vector with itself.")


class CatInteraction(Section):
    """All vectors side by side."""

    kind: Literal["cat"] = "cat"


class DCNInteraction(Section):
    """Low-rank cross network on all vectors side by side (DCN-v2, arXiv 2008.13535, Eq. 4), as in MLPerf DLRM-v2."""

    kind: Literal["dcn"] = "dcn"
    layers: Count = Field(3, description="Cross layers.")
    rank: Count = Field(512, description="Width of the low-rank product of each layer.")


class ProjectionInteraction(Section):
    """Products of two MLPs' outputs, each a few vectors of width dim (torchrec.models.dlrm.DLRM_Projection)."""

    kind: Literal["projection"] = "projection"
    branch1: Widths = Field(description="Layer widths; the last is a multiple of dim.")
    branch2: Widths = Field(description="Layer widths; the last is a multiple of dim.")


Interaction = Annotated[
    DotInteraction | CatInteraction | DCNInteraction | ProjectionInteraction, Field(discriminator="kind")
]


class DLRMConfig(Section):
    """Bottom MLP over the dense features, one pooled vector for each table, interaction, top MLP.

    Without dense features there is no bottom MLP, and the interaction has the vectors of the tables alone.
    """

    kind: Literal["dlrm"] = "dlrm"
    dim: Annotated[int, Field(gt=0, multiple_of=ROW_MULTIPLE)] = Field(description="D: width of every table.")
    bottom: Widths | None = Field(
        None, description="Layer widths after the dense features; the last is dim. Left out where the data has none."
    )
    top: Widths = Field(description="Layer widths after the interaction; the last is 1, the logit.")
    interaction: Interaction = Field(DotInteraction(), description="How the vectors meet before the top MLP.")
    row_weights: bool = Field(
        False, description="Learn a weight for each row of a table, by which it is multiplied before rows are added."
    )
    mlp_init: Literal["normal", "uniform"] = Field(
        "normal", description="normal: as facebookresearch/dlrm; uniform: as torch.nn.Linear, torchrec and MLPerf v2."
    )

    @model_validator(mode="after")
    def _widths_fit(self):
        if self.bottom is not None and self.bottom[-1] != self.dim:
            raise ValueError(f"bottom={list(self.bottom)} must end with dim={self.dim}")
        if self.top[-1] != 1:
            raise ValueError(f"top={list(self.top)} must end with 1, the logit")
        if isinstance(self.interaction, ProjectionInteraction):
            for name in ("branch1", "branch2"):
                widths = getattr(self.interaction, name)
                if widths[-1] % self.dim:
                    raise ValueError(f"interaction.{name}={list(widths)} must end with a multiple of dim={self.dim}")
        return self

    def dense_fault(self, dense_features: int) -> str | None:
        """Why the bottom MLP does not go with a number of dense features; None where it does."""
        if dense_features and self.bottom is None:
            return f"bottom is missing: the layer widths of the MLP that reads the {dense_features} dense features"
        if self.bottom is not None and not dense_features:
            return f"bottom={list(self.bottom)} has nothing to read, as there are no dense features: set it to null"
        return None

    @property
    def table_layout(self) -> tuple[Literal["pooled", "sequence"], int]:
        """Kind and stored columns of every table: the weights of rows stand in a column of their own."""
        return ("sequence", self.dim + ROW_MULTIPLE) if self.row_weights else ("pooled", self.dim)

    def cost(self, dense_features: int, categorical: int, element_bytes: int) -> TowerCost:
        """The cost of an example, counted as one token: MLPs with biases, and the interaction of the vectors.

        dense_features: N. categorical: F, features of ids. element_bytes: of an activation.
        """
        D, interaction = self.dim, self.interaction
        dense = 0 if self.bottom is None else 1  # vectors
        vectors = categorical + dense
        flat = vectors * D
        matrices = biases = 0
        products, activations, width = 0.0, 0.0, flat
        layers: list[tuple[int, int]] = []
        match interaction:
            case ProjectionInteraction(branch1=branch1, branch2=branch2):
                layers = [*pairwise((flat, *branch1)), *pairwise((flat, *branch2))]
                width = dense * D + (branch1[-1] // D) * (branch2[-1] // D)
                products = 2.0 * (width - dense * D) * D
                activations = branch1[-1] + branch2[-1]
            case DotInteraction(self_interaction=self_interaction):
                width = dense * D + vectors * (vectors + (1 if self_interaction else -1)) // 2
                products = 2.0 * vectors * vectors * D
                activations = flat
            case DCNInteraction(layers=cross_layers, rank=rank):
                matrices = cross_layers * 2 * flat * rank
                biases = cross_layers * flat
                # Of a layer: its input, the low-rank vector, and the factor of x_0.
                activations = cross_layers * (2 * flat + rank)
            case CatInteraction():
                pass
        layers += [*pairwise((dense_features, *(self.bottom or ()))), *pairwise((width, *self.top))]
        for into, out in layers:
            matrices += into * out
            biases += out
            activations += into
        return TowerCost(
            parameters=matrices + biases,
            token_flops=2.0 * matrices + products,
            score_flops=0.0,
            kept_bytes=element_bytes * activations,
        )

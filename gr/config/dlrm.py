"""DLRM (arXiv 1906.00091): its dense part and its loss, as a user configures them. No torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from gr.config.inventory import ROW_MULTIPLE
from gr.config.section import PositiveFloat, Section

Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


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
    layers: PositiveInt = 3
    rank: PositiveInt = 512


class ProjectionInteraction(Section):
    """Products of two MLPs' outputs, each a few vectors of width dim (torchrec.models.dlrm.DLRM_Projection)."""

    kind: Literal["projection"] = "projection"
    branch1: Widths = Field(description="Layer widths; the last is a multiple of dim.")
    branch2: Widths = Field(description="Layer widths; the last is a multiple of dim.")


Interaction = Annotated[
    DotInteraction | CatInteraction | DCNInteraction | ProjectionInteraction, Field(discriminator="kind")
]


class DLRMConfig(Section):
    """Bottom MLP over the dense features, one pooled vector for each table, interaction, top MLP."""

    kind: Literal["dlrm"] = "dlrm"
    dim: Annotated[int, Field(gt=0, multiple_of=ROW_MULTIPLE)] = Field(description="D: width of every table.")
    bottom: Widths = Field(description="Layer widths after the dense features; the last is dim.")
    top: Widths = Field(description="Layer widths after the interaction; the last is 1, the logit.")
    interaction: Interaction = DotInteraction()
    row_weights: bool = Field(
        False, description="Learn a weight for each row of a table, by which it is multiplied before rows are added."
    )
    mlp_init: Literal["normal", "uniform"] = Field(
        "normal", description="normal: as facebookresearch/dlrm; uniform: as torch.nn.Linear, torchrec and MLPerf v2."
    )

    @model_validator(mode="after")
    def _widths_fit(self):
        if self.bottom[-1] != self.dim:
            raise ValueError(f"bottom={list(self.bottom)} must end with dim={self.dim}")
        if self.top[-1] != 1:
            raise ValueError(f"top={list(self.top)} must end with 1, the logit")
        if isinstance(self.interaction, ProjectionInteraction):
            for name in ("branch1", "branch2"):
                widths = getattr(self.interaction, name)
                if widths[-1] % self.dim:
                    raise ValueError(f"interaction.{name}={list(widths)} must end with a multiple of dim={self.dim}")
        return self


class BCELoss(Section):
    """Binary cross entropy: -y log p - (1 - y) log(1 - p)."""

    kind: Literal["bce"] = "bce"


class WeightedBCELoss(Section):
    """-w1 y log p - w0 (1 - y) log(1 - p): what facebookresearch/dlrm calls wbce."""

    kind: Literal["wbce"] = "wbce"
    negative_weight: PositiveFloat = 1.0
    positive_weight: PositiveFloat = 1.0


class MSELoss(Section):
    """(p - y)^2, of the probability and not of the logit, as facebookresearch/dlrm has it."""

    kind: Literal["mse"] = "mse"


RankingLoss = Annotated[BCELoss | WeightedBCELoss | MSELoss, Field(discriminator="kind")]

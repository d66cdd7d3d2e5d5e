"""The configuration of a click experiment: DLRM on rows of dense and categorical features, in one pass. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from gr.config.base import Count, PathText, PositiveFloat, Section
from gr.config.dlrm import DLRMConfig
from gr.config.inventory import DLRMDense, LossInventory, TableConfig
from gr.config.run import RunConfig
from gr.schema import TabularSchema


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


ClickLoss = Annotated[BCELoss | WeightedBCELoss | MSELoss, Field(discriminator="kind")]


class TabularDataConfig(Section):
    path: PathText = Field(
        description="Folder with schema.json and part-*.parquet, as written by `gr prepare criteo` or `clicks`."
    )
    shuffle: bool = Field(
        False, description="False: one pass in file order. True: row groups and their rows at random."
    )


class ClickTaskConfig(Section):
    kind: Literal["click"]
    loss: ClickLoss = BCELoss()


class ClickEvaluationConfig(Section):
    path: PathText | None = Field(None, description="Data folder to evaluate on; unset: only the prequential metrics.")
    every: Count | None = Field(None, description="Steps between evaluations; unset: only at the end.")
    global_batch_size: Count = 4096
    window: Count = Field(
        100_000,
        description="Newest training examples in the prequential metrics: each is scored before it is trained on.",
    )

    @model_validator(mode="after")
    def _every_needs_data(self):
        if self.every is not None and self.path is None:
            raise ValueError("every needs path: the data to evaluate on")
        return self


class ClickConfig(RunConfig):
    """Click prediction from dense and categorical features (arXiv 1906.00091)."""

    model_target: ClassVar[str] = "gr.models.dlrm:build_dlrm"

    data: TabularDataConfig
    model: DLRMConfig
    task: ClickTaskConfig
    evaluation: ClickEvaluationConfig = ClickEvaluationConfig()

    def load_schema(self, folder: Path | None = None) -> TabularSchema:
        return TabularSchema.load(folder or self.data.path)

    def batch_sizes(self) -> Mapping[str, int]:
        return {**super().batch_sizes(), "evaluation.global_batch_size": self.evaluation.global_batch_size}

    def tables(self, schema: TabularSchema) -> tuple[TableConfig, ...]:
        """A table for each sparse column, of its name."""
        kind, dim = self.model.table_layout
        return tuple(
            self.table(column.name, column.cardinality, dim=dim, kind=kind, ids_per_example=column.hots)
            for column in schema.sparse
        )

    def dense_part(self, schema: TabularSchema) -> DLRMDense:
        return DLRMDense(**dict(self.model), dense_features=len(schema.dense))

    def loss(self, schema: TabularSchema) -> LossInventory:
        return LossInventory(scores_per_example=1)

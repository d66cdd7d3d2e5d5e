"""The configuration of a click experiment: DLRM on rows of dense and categorical features, in one pass. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gr.config.base import Count, PathText, PositiveFloat, Section
from gr.config.dlrm import DLRMConfig
from gr.config.features import Features, chosen_columns
from gr.config.inventory import DLRMDense, LossInventory, TableConfig
from gr.config.run import FolderEvaluationConfig, RunConfig
from gr.errors import ConfigError
from gr.schema import TabularSchema


class BCELoss(Section):
    """Binary cross entropy: -y log p - (1 - y) log(1 - p)."""

    kind: Literal["bce"] = "bce"


class WeightedBCELoss(Section):
    """-w1 y log p - w0 (1 - y) log(1 - p): what facebookresearch/dlrm calls wbce."""

    kind: Literal["wbce"] = "wbce"
    negative_weight: PositiveFloat = Field(1.0, description="w0, of examples of label 0.")
    positive_weight: PositiveFloat = Field(1.0, description="w1, of examples of label 1.")


class MSELoss(Section):
    """(p - y)^2, of the probability and not of the logit, as facebookresearch/dlrm has it."""

    kind: Literal["mse"] = "mse"


ClickLoss = Annotated[BCELoss | WeightedBCELoss | MSELoss, Field(discriminator="kind")]


class TabularDataConfig(Section):
    path: PathText = Field(
        description="Folder with schema.json and part-*.parquet, as written by `gr prepare criteo` or `clicks`."
    )
    shuffle: bool = Field(
        False,
        description="False: in file order. True: row groups and their rows at random, in another order in each epoch.",
    )


class ClickModelConfig(DLRMConfig):
    """DLRM (arXiv 1906.00091) on the columns that it reads."""

    features: Features | None = Field(
        None, description="Dense and sparse columns that the model reads, in the order of schema.json; unset: all."
    )


class ClickTaskConfig(Section):
    """Click prediction: the probability that a row's label is 1."""

    kind: Literal["click"]
    loss: ClickLoss = Field(BCELoss(), description="Of the predicted probability p and the label y.")


class ClickEvaluationConfig(FolderEvaluationConfig):
    path: PathText | None = Field(None, description="Data folder to evaluate on; unset: only the prequential metrics.")
    global_batch_size: Count = Field(4096, description="Rows a step of evaluation, over all ranks.")
    window: Count = Field(
        100_000,
        description="Newest training examples in the prequential metrics: each is scored before it is trained on.",
    )


class ClickConfig(RunConfig):
    """Click prediction from dense and categorical features (arXiv 1906.00091)."""

    model_target: ClassVar[str] = "gr.models.dlrm:build_dlrm"
    saved_target: ClassVar[str] = "gr.models.saved_click:SavedClick"

    data: TabularDataConfig = Field(description="The rows to train on.")
    model: ClickModelConfig = Field(description="DLRM (arXiv 1906.00091): its widths and its interaction.")
    task: ClickTaskConfig = Field(description="What is predicted, and the loss.")
    evaluation: ClickEvaluationConfig = Field(ClickEvaluationConfig(), description="On which rows, how often.")

    @property
    def model_phrase(self) -> str:
        return f"{self.kind}, dlrm with {self.model.interaction.kind} interaction, width {self.model.dim}"

    def load_schema(self, folder: Path | None = None) -> TabularSchema:
        return chosen_columns(TabularSchema.load(folder or self.data.path), self.model.features)

    def batch_sizes(self) -> Mapping[str, int]:
        return {**super().batch_sizes(), "evaluation.global_batch_size": self.evaluation.global_batch_size}

    def id_columns(self, schema: TabularSchema) -> dict[str, int]:
        return {column.name: column.cardinality for column in schema.sparse}

    def tables(self, schema: TabularSchema) -> tuple[TableConfig, ...]:
        """A table for each sparse column, of its name, unless it shares another's."""
        kind, dim = self.model.table_layout
        rows, hots = self.id_columns(schema), {column.name: column.hots for column in schema.sparse}
        return tuple(
            self.table(
                name,
                rows[name],
                dim=dim,
                kind=kind,
                features=len(columns),
                ids_per_example=sum(hots[column] for column in columns),
            )
            for name, columns in self.columns_by_table(schema).items()
        )

    def dense_part(self, schema: TabularSchema) -> DLRMDense:
        if fault := self.model.dense_fault(len(schema.dense)):
            raise ConfigError(f"model.{fault} ({self.data.path}/schema.json: dense)")
        fields = {name: value for name, value in self.model if name in DLRMConfig.model_fields}
        return DLRMDense(**fields, dense_features=len(schema.dense))

    def loss(self, schema: TabularSchema) -> LossInventory:
        return LossInventory(scores_per_example=1)

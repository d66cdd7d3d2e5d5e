"""The configuration of a ranking experiment on tabular data: DLRM trained in one pass over the rows."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from gr.config.dlrm import BCELoss, DLRMConfig, RankingLoss
from gr.config.section import Section
from gr.config.tree import RunConfig

RANKING_METRICS = ("auc", "ne", "log_loss")


class TabularDataConfig(Section):
    path: str = Field(
        description="Folder with schema.json and part-*.parquet, as written by `gr prepare criteo` or `clicks`."
    )
    shuffle: bool = Field(
        False, description="False: one pass in file order. True: row groups and their rows at random."
    )


class RankingTaskConfig(Section):
    kind: Literal["ranking"]
    loss: RankingLoss = BCELoss()


class RankingEvaluationConfig(Section):
    path: str | None = Field(None, description="Data folder to evaluate on; unset: only the progressive metrics.")
    every: PositiveInt | None = Field(None, description="Steps between evaluations; unset: only at the end.")
    global_batch_size: PositiveInt = 4096
    window: PositiveInt = Field(
        100_000,
        description="Newest training examples in the progressive metrics: each is scored before it is trained on.",
    )

    @model_validator(mode="after")
    def _every_needs_data(self):
        if self.every is not None and self.path is None:
            raise ValueError("every needs path: the data to evaluate on")
        return self


class RankingConfig(RunConfig):
    """Click prediction from dense and categorical features (arXiv 1906.00091)."""

    data: TabularDataConfig
    model: DLRMConfig
    task: RankingTaskConfig
    evaluation: RankingEvaluationConfig = RankingEvaluationConfig()

"""The parts that every experiment on user histories has: its data and its evaluation. No torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gr.config.base import PathText, Probability, Section
from gr.config.run import RunConfig
from gr.schema import DataSchema


class StochasticLength(Section):
    """Train on a subsequence of long histories (arXiv 2402.17152, section 3.3 and App. D)."""

    alpha: Annotated[float, Field(gt=1.0, le=2.0)] = Field(
        1.6, description="A history longer than N^(alpha/2) is cut to that length, except at rate N^alpha / length^2."
    )
    selector: Literal["greedy", "random", "weighted"] = Field(
        "weighted",
        description="Which events stay: the newest, any, or any at a rate that falls with age (counted in events where "
        "the data has no timestamps).",
    )


class HistoryDataConfig(Section):
    path: PathText = Field(description="Folder with schema.json and part-*.parquet, as written by `gr prepare`.")
    max_length: PositiveInt = Field(200, description="N: newest events of a user that the model sees, in tokens.")
    train_holdout: NonNegativeInt = Field(
        2, description="Newest events of each user kept out of training: 2 leaves validation and test, 1 only test."
    )
    cut: Literal["newest", "uniform"] = Field(
        "newest",
        description="Where the example of a user ends: at the newest event, or at one drawn for each epoch, so that "
        "each of the user's n events is the newest at rate 1/n (arXiv 2402.17152, section 2.3).",
    )
    stochastic_length: StochasticLength | None = Field(
        None, description="Train on a part of each long history; unset: on the newest max_length events."
    )
    event_dropout: Probability = Field(
        0.0,
        description="Share of the events of each history that training leaves out, drawn for each epoch: what comes "
        "two events later is then learnt as a successor too. The newest of an example stays.",
    )
    shuffle: bool = Field(True, description="False keeps file order, for one-pass streams.")
    lanes: PositiveInt = Field(8, description="Streams the global batch is dealt from; a multiple of the world size.")
    balance: bool = Field(
        True, description="Deal the examples of a batch to the ranks so that each has as many FLOPs of tower and loss."
    )
    read_threads: PositiveInt = Field(1, description="Threads that decode row groups ahead of their use.")
    prefetch: PositiveInt = Field(4, description="Batches collated ahead of training.")
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="skip counts a bad row and trains on none of it.")


class UserEvaluationConfig(Section):
    path: PathText | None = Field(None, description="Data folder to evaluate on; unset means data.path.")
    every: PositiveInt | None = Field(None, description="Steps between evaluations on the validation split.")
    global_batch_size: PositiveInt = Field(512, description="Users a step of evaluation, over all ranks.")


class HistoryRunConfig(RunConfig):
    """An experiment on user histories."""

    data: HistoryDataConfig = Field(description="The users to train on, and how their histories become examples.")
    evaluation: UserEvaluationConfig = Field(UserEvaluationConfig(), description="On which users, how often.")

    @model_validator(mode="after")
    def _lanes_divide_batch(self):
        if self.trainer.global_batch_size % self.data.lanes:
            raise ValueError(
                f"trainer.global_batch_size={self.trainer.global_batch_size} is not divisible by "
                f"data.lanes={self.data.lanes}"
            )
        return self

    @property
    def model_phrase(self) -> str:
        model: Any = self.model  # type: ignore[attr-defined]
        return f"{self.kind}, {model.tower.kind} of {model.tower.layers} layers, width {model.dim}"

    def load_schema(self, folder: Path | None = None) -> DataSchema:
        return DataSchema.load(folder or self.data.path)

    def batch_sizes(self) -> Mapping[str, int]:
        return {
            "data.lanes": self.data.lanes,
            "trainer.global_batch_size": self.trainer.global_batch_size,
            "evaluation.global_batch_size": self.evaluation.global_batch_size,
        }

    @property
    def evaluates_training_users(self) -> bool:
        """True where evaluation reads the users that training reads, so that their targets must be held out."""
        path = self.evaluation.path
        return path is None or os.path.realpath(path) == os.path.realpath(self.data.path)

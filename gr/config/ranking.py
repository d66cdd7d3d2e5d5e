"""The configuration of a ranking experiment: the actions a user takes on candidates, from their history. No torch."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from gr.config.base import Count, PositiveFloat, Probability, Section
from gr.config.dlrm import Widths, stored_dim
from gr.config.features import ITEM_TABLE, Features, chosen_features
from gr.config.histories import HistoryDataConfig, HistoryRunConfig, UserEvaluationConfig
from gr.config.inventory import LossInventory, TableConfig, TowerDense
from gr.config.towers import TOWERS, STUConfig, TowerConfig
from gr.schema import DataSchema


class StreamConfig(Section):
    """One pass over the events in the order of time, the users of a window in the order of the files."""

    windows: Count = Field(10, description="Equal parts of the time from the first event to the last.")


class RankingDataConfig(HistoryDataConfig):
    max_length: Count = Field(200, description="N: newest events of a user that the model sees, candidates too.")
    train_holdout: Annotated[int, Field(ge=0)] = Field(
        20, description="Newest events of each user kept out of training: those of validation and test."
    )
    candidates: Count = Field(
        10,
        description="With task.supervision=candidates, newest events of an example that are its candidates; a stream "
        "takes all of a window instead.",
    )
    stream: StreamConfig | None = Field(None, description="Train on windows of time; evaluates each before it.")

    @model_validator(mode="after")
    def _a_stream_has_its_own_order(self):
        if self.stream is not None and (self.cut != "newest" or self.train_holdout or self.stochastic_length):
            raise ValueError(
                "stream trains on every event once: set cut to newest, train_holdout to 0 and stochastic_length to null"
            )
        return self


class AdditiveInput(Section):
    """One token an event: vectors of its item and of its actions, added. A candidate has `no action` in their place."""

    kind: Literal["additive"] = "additive"


class InterleavedInput(Section):
    """Two tokens an event, its item and then its actions (arXiv 2402.17152, Table 1). A candidate is an item alone."""

    kind: Literal["interleaved"] = "interleaved"


class TimeEncoding(Section):
    """A vector for the bucket of an age in minutes, added to each token."""

    scale: Literal["sqrt", "log"] = Field(
        "sqrt", description="sqrt: floor(sqrt(m)); log: floor(ln(max(1, m)) / 0.301)."
    )
    buckets: Count = Field(2048, description="Ages beyond the last bucket are put in it.")


class RankingModelConfig(Section):
    dim: Count = Field(64, description="D: width of embeddings and of the tower.")
    features: Features | None = Field(
        None,
        description="Features of events and users that the model reads beside the item, in the order of schema.json; "
        "unset: all.",
    )
    input: Annotated[AdditiveInput | InterleavedInput, Field(discriminator="kind")] = Field(
        InterleavedInput(), description="The tokens that an event becomes."
    )
    time: TimeEncoding | None = Field(TimeEncoding(), description="Unset: no encoding of time.")
    place: Literal["request", "absolute"] = Field(
        "request",
        description="With task.supervision=candidates. request: positions count back from the request, times are ages "
        "at it, and context sees the whole history. absolute: positions count from the window's oldest event, times "
        "are since the event before, and context is plain tokens, so later events change no token before them, and "
        "serving can keep keys and values across requests. With task.supervision=all it is always absolute.",
    )
    input_dropout: Probability = Field(0.2, description="Of the tower's input, as it is trained.")
    tower: Annotated[TowerConfig, TOWERS] = Field(STUConfig(), description="The layers that read the sequence.")
    head: Widths = Field((64,), description="Hidden widths of the MLP from the tower's output to the tasks.")

    @model_validator(mode="after")
    def _tower_fits(self):
        self.tower.check_width(self.dim)
        return self


class ActionTask(Section):
    """The task of predicting whether an action is taken: binary cross entropy."""

    kind: Literal["bce"] = "bce"
    action: str = Field(description="A name in schema.json's actions; also the task's name.")
    weight: PositiveFloat = Field(1.0, description="Of this task's loss in the sum.")

    @property
    def name(self) -> str:
        return self.action


class ValueTask(Section):
    """A number, such as the share watched: squared error."""

    kind: Literal["mse"]
    value: str = Field(description="ratings, or a name in schema.json's values; also the task's name.")
    weight: PositiveFloat = Field(1.0, description="Of this task's loss in the sum.")

    @property
    def name(self) -> str:
        return self.value


class RankingTaskConfig(Section):
    """Ranking: the actions that a user takes on candidates."""

    kind: Literal["ranking"]
    tasks: tuple[Annotated[ActionTask | ValueTask, Field(discriminator="kind")], ...] = Field(
        min_length=1, description="What is predicted of a candidate; the AUC of the first chooses the checkpoint."
    )
    supervision: Literal["all", "candidates"] = Field(
        "all",
        description="all: every event is predicted from those before it, in one pass (needs interleaved input). "
        "candidates: the newest data.candidates events, none of which sees another.",
    )

    @model_validator(mode="after")
    def _tasks_differ(self):
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks={names} name one twice")
        if not isinstance(self.tasks[0], ActionTask):
            raise ValueError("tasks must begin with a bce task: its AUC chooses the checkpoint")
        return self


class RankingEvaluationConfig(UserEvaluationConfig):
    newest: Count = Field(
        10, description="Events of each user that are predicted: the newest in test, those before them in validation."
    )
    window: Count = Field(20_000, description="Newest predictions in the prequential metrics of training.")


class RankingConfig(HistoryRunConfig):
    """Ranking by what a user will do, from the sequence of what they did (arXiv 2402.17152)."""

    model_target: ClassVar[str] = "gr.models.sequence_ranking:SequenceRanker"
    saved_target: ClassVar[str] = "gr.models.saved_ranking:SavedRanking"

    data: RankingDataConfig = Field(description="The users to train on, and how their histories become examples.")
    model: RankingModelConfig = Field(RankingModelConfig(), description="The tokens, the tower and the head.")
    task: RankingTaskConfig = Field(description="What is predicted, and of which events.")
    evaluation: RankingEvaluationConfig = Field(RankingEvaluationConfig(), description="On which users, how often.")

    @model_validator(mode="after")
    def _supervision_fits_the_model(self):
        if self.task.supervision == "all" and not isinstance(self.model.input, InterleavedInput):
            raise ValueError(
                "task.supervision=all needs model.input.kind=interleaved: an additive token shows the action that is "
                "to be predicted. Set one of them, task.supervision=candidates or model.input.kind=interleaved"
            )
        tower = self.model.tower
        if self.task.supervision == "all" and tower.length_leak:
            raise ValueError(
                f"model.tower.{tower.length_leak} tells a predicted event how many events come after it: unset it, or "
                "use task.supervision=candidates"
            )
        if self.task.supervision == "candidates" and not tower.masks_candidates:
            raise ValueError(
                f"task.supervision=candidates needs a tower with a mask for candidates, such as stu, not {tower.kind}: "
                "set model.tower.kind=stu"
            )
        return self

    @model_validator(mode="after")
    def _predictions_are_held_out(self):
        evaluation, data = self.evaluation, self.data
        if data.stream is not None and (self.trainer.epochs or 1) > 1:
            raise ValueError(
                f"data.stream is one pass in the order of time, so trainer.epochs={self.trainer.epochs} cannot be: set "
                "it to 1"
            )
        if evaluation.newest > data.max_length:
            raise ValueError(f"evaluation.newest={evaluation.newest} must be at most data.max_length={data.max_length}")
        if self.task.supervision == "candidates" and data.candidates >= data.max_length:
            raise ValueError(
                f"data.candidates={data.candidates} leaves no room for history in data.max_length={data.max_length}"
            )
        if data.stream is not None and evaluation.every and self.evaluates_training_users:
            raise ValueError(
                f"data.stream trains on every event, so evaluation.every={evaluation.every} has none to evaluate: "
                "unset it, or evaluate on other users with evaluation.path"
            )
        needed = evaluation.newest * (2 if evaluation.every else 1)
        if data.stream is None and self.evaluates_training_users and data.train_holdout < needed:
            raise ValueError(
                f"data.train_holdout={data.train_holdout} trains on what is evaluated: set it to {needed}, "
                f"lower evaluation.newest={evaluation.newest}, or evaluate on other users with evaluation.path"
            )
        return self

    def load_schema(self, folder: Path | None = None) -> DataSchema:
        return chosen_features(super().load_schema(folder), self.model.features)

    def id_columns(self, schema: DataSchema) -> dict[str, int]:
        """The item, the features of events, then contextual ones."""
        return {ITEM_TABLE: schema.item_cardinality, **schema.event_features, **schema.contextual}

    def tables(self, schema: DataSchema) -> tuple[TableConfig, ...]:
        """A table for each feature of ids, of the feature's name, unless it shares another's."""
        rows, N = self.id_columns(schema), self.data.max_length
        return tuple(
            self.table(
                name,
                rows[name],
                dim=stored_dim(self.model.dim),
                kind="sequence",
                features=len(columns),
                ids_per_example=sum(1 if column in schema.contextual else N for column in columns),
            )
            for name, columns in self.columns_by_table(schema).items()
        )

    def dense_part(self, schema: DataSchema) -> TowerDense:
        """The tower, the tokens' vectors and the head. Every example counts as data.max_length events."""
        model, N = self.model, self.data.max_length
        contextual = len(schema.contextual) + len(schema.contextual_numeric)
        interleaved = isinstance(model.input, InterleavedInput)
        tokens = contextual + N * (2 if interleaved else 1)
        # Positions, buckets of time, actions with their offset, `no action`, slopes and offsets of numbers.
        vectors = N + 1 + contextual + (model.time.buckets if model.time else 0) + len(schema.actions) + 1
        vectors += (not interleaved) + 2 * len(schema.contextual_numeric)
        widths = [model.dim, *model.head, len(self.task.tasks)]
        head = 2 * model.dim + sum((into + 1) * out for into, out in pairwise(widths))  # a norm, linear maps
        return TowerDense(
            tower=model.tower,
            dim=model.dim,
            mean_length=float(tokens),
            max_length=tokens,
            other_parameters=vectors * model.dim + head,
            replicated_parameters=vectors * model.dim,
        )

    def loss(self, schema: DataSchema) -> LossInventory:
        by_candidates = self.task.supervision == "candidates" and self.data.stream is None
        predicted = self.data.candidates if by_candidates else self.data.max_length
        return LossInventory(scores_per_example=predicted * len(self.task.tasks))

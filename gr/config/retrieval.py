"""The configuration of a retrieval experiment: the next item, from the sequence of those before it. No torch."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, model_validator

from gr.config.base import Count, PositiveFloat, Probability, Section
from gr.config.dlrm import stored_dim
from gr.config.features import ITEM_TABLE, Features, chosen_item_features
from gr.config.histories import HistoryRunConfig, UserEvaluationConfig
from gr.config.inventory import LossInventory, TableConfig, TowerDense
from gr.config.sizing import retrieval_sizes
from gr.config.towers import TOWERS, HSTUConfig, TowerConfig
from gr.schema import LARGEST_DENSE, DataSchema

# Up to here looking up the whole corpus costs less than finding the distinct items of a step.
SMALL_CORPUS = 1 << 16
LOSS_CHUNK = 1024  # tokens whose scores against all items are in memory together
METRICS = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")


class RetrievalModelConfig(Section):
    dim: Count = Field(50, description="D: width of item embeddings and of the tower.")
    features: Features = Field(
        (), description="Features of items, columns of items.parquet, whose vectors are added to the item's."
    )
    input_dropout: Probability = Field(0.2, description="Of the tower's input, as it is trained.")
    tower: Annotated[TowerConfig, TOWERS] = Field(HSTUConfig(), description="The layers that read the sequence.")

    @model_validator(mode="after")
    def _tower_fits(self):
        self.tower.check_width(self.dim)
        return self


@dataclass(frozen=True)
class Comparison:
    """The sizes of a loss. corpus: items. targets: targets of an example. global_batch_size: examples of a step."""

    corpus: int
    targets: float
    global_batch_size: int


class NegativesConfig(Section):
    """A choice of the items that a step compares its targets with."""

    kind: str

    @abstractmethod
    def scores(self, compared: Comparison) -> LossInventory:
        """The scores of an example."""

    @abstractmethod
    def lookups(self, compared: Comparison) -> tuple[float, float]:
        """The candidates that are looked up: of an example, and of a step on each rank whatever its batch."""


class PerPositionNegatives(NegativesConfig):
    """Uniform negatives of its own for every position (the reference of arXiv 2402.17152)."""

    kind: Literal["per_position"] = "per_position"
    count: Count = Field(128, description="Negatives of each position.")

    def scores(self, compared: Comparison) -> LossInventory:
        return LossInventory(scores_per_example=compared.targets * (1 + self.count))

    def lookups(self, compared: Comparison) -> tuple[float, float]:
        # From a large corpus they count as drawn, though the sampler looks each distinct one up once.
        if compared.corpus <= SMALL_CORPUS:
            return 0.0, compared.corpus
        return compared.targets * (1 + self.count), 0.0


class SharedNegatives(NegativesConfig):
    """One uniform draw of negatives shared by all positions of the global batch."""

    kind: Literal["shared"] = "shared"
    count: Count = Field(1024, description="Negatives of a step, over all ranks.")

    def scores(self, compared: Comparison) -> LossInventory:
        return LossInventory(scores_per_example=compared.targets * (1 + self.count))

    def lookups(self, compared: Comparison) -> tuple[float, float]:
        return compared.targets, self.count


class InBatchNegatives(NegativesConfig):
    """The other targets of the global batch, corrected by log Q from item frequency (Yi et al., RecSys 2019)."""

    kind: Literal["in_batch"] = "in_batch"

    def scores(self, compared: Comparison) -> LossInventory:
        items = self.lookups(compared)[1]
        return LossInventory(scores_per_example=compared.targets * items, tokens_at_once=LOSS_CHUNK)

    def lookups(self, compared: Comparison) -> tuple[float, float]:
        return 0.0, min(compared.global_batch_size * compared.targets, compared.corpus)


class FullSoftmax(NegativesConfig):
    """Every item of the corpus: for small catalogues."""

    kind: Literal["full"] = "full"

    def scores(self, compared: Comparison) -> LossInventory:
        return LossInventory(scores_per_example=compared.targets * compared.corpus, tokens_at_once=LOSS_CHUNK)

    def lookups(self, compared: Comparison) -> tuple[float, float]:
        return 0.0, compared.corpus


class MixtureConfig(Section):
    """A mixture of logits: a learned similarity in place of one product of vectors (arXiv 2407.15462)."""

    kind: Literal["mol"] = "mol"
    query_vectors: Count = Field(4, description="Vectors of a query.")
    item_vectors: Count = Field(4, description="Vectors of an item; each pair of two vectors is a logit.")
    dim: Count = Field(32, description="Width of these vectors.")
    hidden: Count = Field(32, description="Width of the hidden layers of the gates.")
    dropout: Probability = Field(0.2, description="Of the gates, as they are trained.")
    balance: NonNegativeFloat = Field(
        0.001, description="Weight of the load-balance loss, which keeps all logits in use."
    )

    def parameters(self, dim: int) -> int:
        """dim: D of queries and items. Two maps to vectors, three gates of two layers; all with biases."""
        P = self.query_vectors * self.item_vectors
        vectors = (dim + 1) * (self.query_vectors + self.item_vectors) * self.dim
        return vectors + (2 * dim + P + 3) * self.hidden + 3 * (self.hidden + 1) * P


class SimilarityConfig(Section):
    """The score of an item for a user, and what a loss computes of it."""

    temperature: PositiveFloat = Field(0.05, description="What scores are divided by before the softmax.")
    l2_norm: bool = Field(True, description="Cosine similarity; false is a plain dot product.")

    def mixture_parameters(self, dim: int) -> int:
        """The parameters of a learned similarity, which only retrieval has."""
        return 0

    @abstractmethod
    def scores(self, compared: Comparison) -> LossInventory:
        """The scores of an example."""

    @abstractmethod
    def lookups(self, compared: Comparison) -> tuple[float, float]:
        """The candidates that are looked up: of an example, and of a step on each rank whatever its batch."""


class RetrievalTaskConfig(SimilarityConfig):
    """Retrieval: the next item of a user among all items."""

    kind: Literal["retrieval"] = "retrieval"
    negatives: Annotated[
        PerPositionNegatives | SharedNegatives | InBatchNegatives | FullSoftmax, Field(discriminator="kind")
    ] = Field(PerPositionNegatives(), description="The items that a target is compared with.")
    similarity: MixtureConfig | None = Field(
        None, description="A learned similarity; unset: the cosine or dot product that l2_norm chooses."
    )

    @model_validator(mode="after")
    def _a_mixture_is_of_cosines(self):
        if self.similarity is not None and not self.l2_norm:
            raise ValueError("l2_norm=false, but the logits of similarity.kind=mol are cosines: leave l2_norm out")
        return self

    def scores(self, compared: Comparison) -> LossInventory:
        loss = self.negatives.scores(compared)
        if self.similarity is None:
            return loss
        logits = self.similarity.query_vectors * self.similarity.item_vectors
        return loss.model_copy(update={"scores_per_example": loss.scores_per_example * logits})

    def lookups(self, compared: Comparison) -> tuple[float, float]:
        return self.negatives.lookups(compared)

    def mixture_parameters(self, dim: int) -> int:
        return 0 if self.similarity is None else self.similarity.parameters(dim)


class RetrievalEvaluationConfig(UserEvaluationConfig):
    filter_seen: Literal["window", "all", "none"] = Field(
        "all",
        description="Items never recommended: those in the model's window, in the user's whole history, or none.",
    )
    select_by: Literal[METRICS] = Field("ndcg@10", description="Validation metric that picks the best checkpoint.")
    patience: Count | None = Field(
        None, description="Evaluations without a new best of select_by after which training ends; unset: never."
    )
    baselines: tuple[Literal["popularity", "item_knn", "markov", "ease"], ...] = Field(
        ("popularity", "item_knn", "markov", "ease"),
        description="Scored on the same split and candidates in the final report, with settings chosen on the event "
        "before.",
    )
    loss: bool = Field(
        False,
        description="Adds `loss`: the mean over all events of the users of path of -log p(event | those before it), a "
        "softmax over all items, in nats.",
    )


class RetrievalConfig(HistoryRunConfig):
    """Generative retrieval from user histories."""

    model_target: ClassVar[str] = "gr.models.retrieval:RetrievalModel"
    saved_target: ClassVar[str] = "gr.models.saved_retrieval:SavedRetrieval"

    sizes: Literal["data", "written"] = Field(
        "written",
        description="data: keys that are unset take values that follow from schema.json, which the log explains.",
    )
    model: RetrievalModelConfig = Field(RetrievalModelConfig(), description="The embeddings' width and the tower.")
    task: RetrievalTaskConfig = Field(RetrievalTaskConfig(), description="The loss: similarity and negatives.")
    evaluation: RetrievalEvaluationConfig = Field(
        RetrievalEvaluationConfig(), description="On which users, how often, without which items."
    )

    @model_validator(mode="after")
    def _targets_are_held_out(self):
        needed = 2 if self.evaluation.every else 1
        if self.evaluates_training_users and self.data.train_holdout < needed:
            raise ValueError(
                f"data.train_holdout={self.data.train_holdout} trains on what is evaluated: set it to {needed}"
                + (", or unset evaluation.every (validation)" if needed == 2 else "")
                + ", or evaluate on other users with evaluation.path"
            )
        return self

    @model_validator(mode="after")
    def _loss_is_of_other_users(self):
        if self.evaluation.loss and self.evaluates_training_users:
            raise ValueError("evaluation.loss=true takes all events of its users: name others with evaluation.path")
        if self.evaluation.loss and self.task.similarity is not None:
            raise ValueError("evaluation.loss=true is of scores that are products: leave task.similarity out")
        return self

    def load_schema(self, folder: Path | None = None) -> DataSchema:
        return chosen_item_features(super().load_schema(folder), self.model.features)

    def reasons(self, schema: DataSchema) -> list[str]:
        if self.sizes != "data":
            return []
        sizes = retrieval_sizes(schema).items()
        return [f"{key}={size.value}: {size.reason}" for key, size in sizes if self._value(key) == size.value]

    def _value(self, key: str) -> Any:
        """The value at a dotted key, sections as mappings; None where this tower has no such key."""
        value: Any = self.model_dump()
        for part in key.split("."):
            value = value.get(part)
        return value

    def id_columns(self, schema: DataSchema) -> dict[str, int]:
        """The item, then its features."""
        return {ITEM_TABLE: schema.item_cardinality, **schema.event_features}

    def tables(self, schema: DataSchema) -> tuple[TableConfig, ...]:
        """The item table and those of its features, which the history and the candidates read."""
        rows = self.id_columns(schema)
        compared = self.compared(schema)
        candidates, candidates_of_step = self.task.lookups(compared)
        return tuple(
            self.table(
                name,
                rows[name],
                dim=stored_dim(self.model.dim),
                kind="sequence",
                features=2 * len(columns),  # the history and the candidates
                ids_per_example=len(columns) * (compared.targets + candidates),
                ids_per_step=len(columns) * candidates_of_step,
            )
            for name, columns in self.columns_by_table(schema).items()
        )

    def dense_part(self, schema: DataSchema) -> TowerDense:
        N, D = self.data.max_length, self.model.dim
        others = N * D + self.task.mixture_parameters(D)  # positions
        return TowerDense(
            tower=self.model.tower,
            dim=D,
            mean_length=self.compared(schema).targets,
            max_length=N,
            other_parameters=others,
            replicated_parameters=others,
        )

    def loss(self, schema: DataSchema) -> LossInventory:
        return self.task.scores(self.compared(schema))

    def compared(self, schema: DataSchema) -> Comparison:
        """The targets of an example and the corpus. Every example counts as data.max_length events, the most it has."""
        # Row 0 is padding; raw ids are not counted by the largest.
        items = schema.items if schema.item_cardinality > LARGEST_DENSE else schema.item_cardinality - 1
        return Comparison(items, float(self.data.max_length), self.trainer.global_batch_size)

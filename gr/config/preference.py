"""The configuration of the preference stage: a retrieval model fine-tuned on graded feedback. No torch."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gr.config.base import Count, CountOrNone, PathText, PositiveFloat, Section
from gr.config.inventory import LossInventory, TowerDense
from gr.config.retrieval import METRICS, Comparison, RetrievalConfig, RetrievalEvaluationConfig, SimilarityConfig
from gr.errors import ConfigError
from gr.schema import DataSchema

PREFERENCE_METRICS = ("liked_hr@10", "liked_ndcg@10", "liked_mrr")


class LevelsConfig(Section):
    """The level of an event's feedback, a whole number from 0; the higher, the better it was liked."""

    kind: str

    @property
    @abstractmethod
    def highest(self) -> int:
        """The highest level."""

    @abstractmethod
    def column(self, schema: DataSchema) -> str:
        """The event column that says it. Raises ConfigError where the data has none."""


class RatingLevels(LevelsConfig):
    """The number of thresholds that a rating reaches."""

    kind: Literal["ratings"] = "ratings"
    thresholds: tuple[float, ...] = Field((2.0, 3.0, 4.0, 5.0), min_length=1, description="Ascending.")

    @model_validator(mode="after")
    def _ascending(self):
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"thresholds={list(self.thresholds)} do not ascend")
        return self

    @property
    def highest(self) -> int:
        return len(self.thresholds)

    def column(self, schema: DataSchema) -> str:
        if not schema.ratings:
            raise ConfigError(
                f"task.levels.kind=ratings, but {schema.name} has no ratings: prepare data with ratings, or set "
                "task.levels={kind: actions, order: [...]}"
            )
        return "ratings"


class ActionLevels(LevelsConfig):
    """The place in `order`, from 1, of the strongest action that was taken; 0 where none was."""

    kind: Literal["actions"] = "actions"
    order: tuple[str, ...] = Field(min_length=1, description="Actions of the data, the weakest first: click, purchase.")

    @property
    def highest(self) -> int:
        return len(self.order)

    def column(self, schema: DataSchema) -> str:
        for action in self.order:
            if action not in schema.actions:
                known = ", ".join(schema.actions) or "none"
                raise ConfigError(f"task.levels.order: {schema.name} has no action {action}; it has {known}")
        return "actions"


class PreferenceLoss(Section):
    """The loss of a preference run."""

    frozen_copies: ClassVar[int] = 1  # of the dense part, the reference among them


class RewardLoss(PreferenceLoss):
    """-log sigmoid(r(chosen) - r(rejected) - margin), the reward model of Llama 2 (arXiv 2307.09288, Eq. 2)."""

    kind: Literal["reward"] = "reward"
    margins: tuple[Annotated[float, Field(ge=0.0)], ...] = Field(
        (0.0, 1 / 3, 2 / 3, 1.0),
        min_length=1,
        description="By the gap of the levels, from 1; the last is also that of larger gaps.",
    )


class DPOLoss(PreferenceLoss):
    """-log sigmoid(beta x (gain of the chosen item - gain of the rejected one)) (arXiv 2305.18290, Eq. 7)."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = Field(0.1, description="The larger, the nearer the model stays to the reference.")


class SDPOLoss(PreferenceLoss):
    """DPO against several rejected items at once by a softmax over them (arXiv 2406.09215, Eq. 11)."""

    kind: Literal["sdpo"] = "sdpo"
    beta: PositiveFloat = Field(1.0, description="The larger, the nearer the model stays to the reference.")


class ListLoss(PreferenceLoss):
    """The loss of lists that a policy draws and a reward model scores, in place of pairs from the data."""

    kind: str
    reward: PathText = Field(
        description="Run or checkpoint of the reward model: a preference run of task.loss.kind=reward that began where "
        "this one begins."
    )
    candidates: Count = Field(
        200, description="Items not in the history that the policy ranks highest after it: lists are drawn of them."
    )

    @property
    @abstractmethod
    def drawn(self) -> int:
        """The items that are drawn after a history."""


class RejectionLoss(ListLoss):
    """-log p(the best of several drawn items), by a reward model: rejection sampling (arXiv 2307.09288, 3.2.3)."""

    frozen_copies = 2  # the reward model
    kind: Literal["rejection"] = "rejection"
    samples: Annotated[int, Field(ge=2)] = Field(
        8, description="Items drawn from the policy that the run begins from, of which the best is trained on."
    )

    @property
    def drawn(self) -> int:
        return self.samples


class PPOLoss(ListLoss):
    """PPO on drawn lists, with the reward of Llama 2 (arXiv 2307.09288, Eq. 4; arXiv 1707.06347)."""

    frozen_copies = 3  # the reward model, and the policy that draws
    kind: Literal["ppo"] = "ppo"
    length: Count = Field(10, description="Items of a list.")
    beta: PositiveFloat = Field(0.01, description="Weight of the KL penalty: of log p(list) - log p of the reference.")
    clip: PositiveFloat = Field(
        0.2, description="The ratio to the policy that drew counts within 1 - clip to 1 + clip."
    )
    steps_per_policy: Count = Field(
        8, description="Steps whose lists one policy draws: the paper's 512 lists, in minibatches of 64."
    )
    value_weight: PositiveFloat = Field(0.1, description="Weight of the value head's squared error.")

    @property
    def drawn(self) -> int:
        return self.length


class PreferenceTaskConfig(SimilarityConfig):
    """Preference: of two items that a user met soon after one another, the better liked one."""

    kind: Literal["preference"] = "preference"
    loss: Annotated[RewardLoss | DPOLoss | SDPOLoss | RejectionLoss | PPOLoss, Field(discriminator="kind")] = Field(
        SDPOLoss(),
        description="What each chosen item is trained by; reward and dpo average over its rejected items. rejection "
        "and ppo train on lists of their own, and read no pairs: chosen, window, rejected and drawn are not for them.",
    )
    levels: Annotated[RatingLevels | ActionLevels, Field(discriminator="kind")] = Field(
        RatingLevels(), description="How much an event was liked."
    )
    liked: PositiveInt = Field(
        3, description="Level from which a target is liked; metrics liked_* are over the users with such a target."
    )
    window: Annotated[int, Field(ge=2)] = Field(
        10, description="W: the chosen event and those after it, among which rejected ones are."
    )
    chosen: NonNegativeInt = Field(3, description="Level from which an event is chosen.")
    rejected: Count = Field(3, description="Rejected items of a chosen one at most, those of the nearest events.")
    drawn: CountOrNone = Field(
        32,
        description="Items of the corpus drawn evenly beside the rejected ones, as of level 0. Without them the scores "
        "of the chosen items fall together with those of the rejected ones, below those of all others.",
    )

    @model_validator(mode="after")
    def _fits(self):
        for name in ("liked", "chosen"):
            if getattr(self, name) > self.levels.highest:
                raise ValueError(
                    f"{name}={getattr(self, name)}, but the highest of task.levels is {self.levels.highest}: set "
                    f"{name} up to that"
                )
        if isinstance(self.loss, ListLoss) and self.loss.drawn > self.loss.candidates:
            raise ValueError(
                f"loss.candidates={self.loss.candidates}, of which loss.{self.loss.kind} draws {self.loss.drawn}: set "
                "candidates to that or more"
            )
        if self.rejected >= self.window:
            raise ValueError(
                f"rejected={self.rejected}, but a window of {self.window} events has {self.window - 1} after the "
                f"chosen one: set window above {self.rejected}"
            )
        return self

    @property
    def compared_items(self) -> int:
        """The most items that a position compares: the chosen one, the rejected ones and those drawn."""
        return 1 + self.rejected + self.drawn

    def scores(self, compared: Comparison) -> LossInventory:
        if isinstance(self.loss, ListLoss):  # the corpus once, and candidates by each dense part
            of_parts = (1 + self.loss.frozen_copies) * self.loss.candidates
            return LossInventory(scores_per_example=compared.corpus + of_parts)
        return LossInventory(scores_per_example=2 * compared.targets * self.compared_items)  # policy and reference

    def lookups(self, compared: Comparison) -> tuple[float, float]:
        if isinstance(self.loss, ListLoss):
            return float(self.loss.candidates), 0.0
        return compared.targets * self.compared_items, 0.0


class PreferenceEvaluationConfig(RetrievalEvaluationConfig):
    select_by: Literal[(*METRICS, *PREFERENCE_METRICS)] = Field(  # type: ignore[valid-type]
        "liked_hr@10", description="Validation metric that picks the best checkpoint."
    )
    later: PositiveInt | None = Field(
        None,
        description="Newest events of each user, hidden from the model, whose ratings later_rating_of_top@10 averages; "
        "unset: all that training leaves out (data.train_holdout), or 10 of users who are not trained on.",
    )


class PreferenceConfig(RetrievalConfig):
    """A retrieval model, fine-tuned on graded feedback from the checkpoint of checkpoint.load_from."""

    model_target: ClassVar[str] = "gr.models.preference:PreferenceModel"

    task: PreferenceTaskConfig = Field(PreferenceTaskConfig(), description="The loss and its pairs.")  # type: ignore[assignment]
    evaluation: PreferenceEvaluationConfig = Field(
        PreferenceEvaluationConfig(), description="On which users, how often, without which items."
    )

    @property
    def later_events(self) -> int:
        """Events of each user that a final report hides to see how its top 10 were rated later."""
        return self.evaluation.later or (self.data.train_holdout if self.evaluates_training_users else 10)

    @model_validator(mode="after")
    def _later_is_held_out(self):
        if self.evaluates_training_users and self.later_events > self.data.train_holdout:
            raise ValueError(
                f"evaluation.later={self.later_events} events, of which training reads all but "
                f"data.train_holdout={self.data.train_holdout}: set later up to that, or evaluate on other users"
            )
        return self

    def dense_part(self, schema: DataSchema) -> TowerDense:
        """The tower, its positions, their frozen copies, and PPO's value head."""
        dense = super().dense_part(schema)
        N, D = self.data.max_length, self.model.dim
        tower = self.model.tower.cost(D, N, 4).parameters
        more = self.task.loss.frozen_copies * (tower + N * D) + 2 * isinstance(self.task.loss, PPOLoss)
        names = ("other_parameters", "replicated_parameters")
        return dense.model_copy(update={name: getattr(dense, name) + more for name in names})

"""The configuration of a causal language model: the next token, from those before it in its document. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gr.config.base import Count, PathText, Section
from gr.config.inventory import LossInventory, TableConfig, TowerDense
from gr.config.run import FolderEvaluationConfig, RunConfig
from gr.config.towers import TOWERS, LlamaConfig, TowerConfig
from gr.errors import ConfigError
from gr.schema import TextSchema

LOSS_CHUNK = 1024  # tokens whose scores against the whole vocabulary are in memory together


class TextDataConfig(Section):
    path: PathText = Field(description="Folder with schema.json and part-*.parquet, as written by `gr prepare text`.")
    max_length: Count = Field(
        4096,
        description="N: tokens of an example. Documents follow one another, cut where an example ends, and no token "
        "sees another document.",
    )
    shuffle: bool = Field(True, description="Documents in another order in each epoch; false: in file order.")


class CausalLMModelConfig(Section):
    vocabulary: Count = Field(description="V: ids of tokens, those of the tokenizer that made the data.")
    dim: Count = Field(description="D: width of embeddings and of the tower.")
    tower: Annotated[TowerConfig, TOWERS] = Field(LlamaConfig(), description="The layers that read the sequence.")

    @model_validator(mode="after")
    def _tower_fits(self):
        self.tower.check_width(self.dim)
        if self.tower.uses_time:
            raise ValueError(f"tower.kind={self.tower.kind} reads timestamps, which text has none of: unset that")
        if self.tower.length_leak:
            raise ValueError(
                f"tower.{self.tower.length_leak} tells a token how many come after it, which it is to predict: unset it"
            )
        return self


class CausalLMTaskConfig(Section):
    """A causal language model: the next token of a document, where it is not of a prompt."""

    kind: Literal["causal_lm"]


class CausalLMEvaluationConfig(FolderEvaluationConfig):
    path: PathText | None = Field(None, description="Text folder to evaluate on; unset: nothing is evaluated.")
    global_batch_size: Count = Field(8, description="Examples of data.max_length tokens a step, over all ranks.")


class CausalLMConfig(RunConfig):
    """A causal language model (Llama 2, arXiv 2307.09288, sections 2 and 3.1)."""

    model_target: ClassVar[str] = "gr.models.causal_lm:CausalLM"
    saved_target: ClassVar[str] = "gr.models.saved_causal_lm:SavedCausalLM"

    data: TextDataConfig = Field(description="The documents to train on, and how they become examples.")
    model: CausalLMModelConfig = Field(description="The vocabulary, the width and the tower.")
    task: CausalLMTaskConfig = Field(description="What is predicted.")
    evaluation: CausalLMEvaluationConfig = Field(CausalLMEvaluationConfig(), description="On which text, how often.")

    @property
    def model_phrase(self) -> str:
        return f"{self.kind}, {self.model.tower.kind} of {self.model.tower.layers} layers, width {self.model.dim}"

    def load_schema(self, folder: Path | None = None) -> TextSchema:
        schema = TextSchema.load(folder or self.data.path)
        if schema.vocabulary != self.model.vocabulary:
            raise ConfigError(
                f"model.vocabulary={self.model.vocabulary}, but the tokenizer of {folder or self.data.path} has "
                f"{schema.vocabulary} ids: set it to that, or prepare the text with the model's own tokenizer"
            )
        return schema

    def planning_schema(self) -> None:
        """None: every size is in the configuration, so that a plan needs no data."""

    def batch_sizes(self) -> Mapping[str, int]:
        evaluated = {"evaluation.global_batch_size": self.evaluation.global_batch_size} if self.evaluation.path else {}
        return {**super().batch_sizes(), **evaluated}

    def id_columns(self, schema: Any) -> dict[str, int]:
        return {}

    def tables(self, schema: Any) -> tuple[TableConfig, ...]:
        """None: the vectors of tokens are a dense parameter, as all of the model."""
        return ()

    def dense_part(self, schema: Any) -> TowerDense:
        model, N = self.model, self.data.max_length
        return TowerDense(
            tower=model.tower,
            dim=model.dim,
            mean_length=float(N),
            max_length=N,
            other_parameters=2 * model.vocabulary * model.dim,  # of what goes in and of what comes out
        )

    def loss(self, schema: Any) -> LossInventory:
        scores = self.data.max_length * self.model.vocabulary
        return LossInventory(scores_per_example=scores, tokens_at_once=LOSS_CHUNK)

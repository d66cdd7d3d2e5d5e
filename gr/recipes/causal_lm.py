"""Causal language models: the next token of documents, packed into examples of one length."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gr.batch import TokenBatch
from gr.config.causal_lm import CausalLMConfig
from gr.data.loader import ResumableLoader
from gr.data.text import TextDataset, TextPass
from gr.data.vocabulary import check_digest
from gr.dist import World
from gr.errors import DataError
from gr.planner.estimate_dense import sequence_flops
from gr.recipes.base import Evaluation, ReportTable, Training
from gr.recipes.folder import FolderRecipe
from gr.schema import SCHEMA_FILE, TOKENIZER_FILE, TextSchema
from gr.training.module import Inputs
from gr.training.trainer import Callback

COLUMNS = ("loss", "perplexity", "tokens")


class CausalLMObjective:
    """The loss of every scored token: -log p(the one that follows). max_length: N, tokens of an example."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def losses(self, batch: TokenBatch) -> int:
        return int(batch.scored_T.sum())

    def examples(self, batch: TokenBatch) -> int:
        return -(-len(batch.ids_T) // self.max_length)

    def inputs(self, batch: TokenBatch, step: int, first: int, device: torch.device) -> Inputs:
        return Inputs(batch.to(device))

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        return model(inputs.batch)


class CausalLMRecipe(FolderRecipe[CausalLMConfig]):
    """Trains on the documents of data.path; evaluates on those of evaluation.path, where it is set."""

    schema: TextSchema

    @cached_property
    def evaluation_data(self) -> TextDataset | None:
        path = self.config.evaluation.path
        return TextDataset.open(path, self.config.load_schema(Path(path))) if path else None

    @property
    def artifacts(self) -> list[str]:
        return [SCHEMA_FILE, *([TOKENIZER_FILE] if self.schema.tokenizer else [])]

    def artifact(self, name: str) -> bytes:
        content = super().artifact(name)
        if name == TOKENIZER_FILE and self.schema.tokenizer is not None:
            check_digest(self.folder / name, content, self.schema.tokenizer)
        return content

    def check_data(self) -> None:
        if self.evaluation_data is None:
            return
        evaluated = self.evaluation_data
        if evaluated.schema.tokenizer != self.schema.tokenizer:
            raise DataError(
                f"{self.folder} and {evaluated.path} were made by different tokenizers (schema.json: tokenizer): "
                "prepare both with one"
            )

    def objective(self, world: World) -> CausalLMObjective:
        return CausalLMObjective(self.config.data.max_length)

    def loader(self, world: World) -> ResumableLoader[TokenBatch]:
        config = self.config
        documents = self._pass(
            TextDataset.open(self.config.data.path, self.schema),
            world,
            config.trainer.global_batch_size,
            shuffle_seed=config.seed if config.data.shuffle else None,
            epochs=config.trainer.epochs or 1,
        )
        of = f"{config.trainer.global_batch_size} x {config.data.max_length} tokens"
        self.check_steps(len(documents), of, ", or to null and trainer.epochs to 2 or more")
        return ResumableLoader(documents)

    def _pass(self, data: TextDataset, world: World, size: int, **more: Any) -> TextPass:
        return TextPass(
            data,
            global_batch_size=size,
            max_length=self.config.data.max_length,
            rank=world.rank,
            world_size=world.size,
            **more,
        )

    def flops(self) -> Callable[[TokenBatch], float]:
        inventory = self.config.inventory(None)
        return lambda batch: float(sequence_flops(inventory, batch.offsets_B1.diff().numpy()).sum())

    def callbacks(self, training: Training) -> list[Callback]:
        tokens = self.evaluation_data.schema.tokens if self.evaluation_data is not None else 0
        return self.evaluation_callbacks(training, ("loss", "perplexity"), f"{tokens:,} tokens")

    def measure(self, model: nn.Module, world: World) -> Evaluation:
        """The mean loss of every scored token, in nats."""
        assert self.evaluation_data is not None, "FolderRecipe measures what there is"
        total, tokens = 0.0, 0
        documents = self._pass(self.evaluation_data, world, self.config.evaluation.global_batch_size, drop_last=False)
        with ResumableLoader(documents) as loader:
            for batch in loader:
                tokens += int(batch.scored_T.sum())
                total += float(model(batch.to(world.device)).double())
        total, counted = world.all_reduce_sum([total, float(tokens)])
        loss = total / counted if counted else None
        perplexity = None if loss is None else math.exp(min(loss, 700.0))
        return Evaluation({"loss": loss, "perplexity": perplexity, "tokens": counted})

    @classmethod
    def tables(cls, report: Mapping[str, Any]) -> list[ReportTable] | str:
        if not report["model"]:
            return "evaluation.path is unset: see the losses of training in metrics.jsonl"
        return [ReportTable(str(report["data"]), {"model": report["model"]}, COLUMNS)]

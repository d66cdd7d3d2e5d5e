"""The base of recipes that evaluate on a folder, evaluation.path, and not on held-out events."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from gr.config.run import RunConfig
from gr.dist import World
from gr.errors import ConfigError
from gr.recipes.base import Evaluation, Recipe, Split, Training
from gr.training import callbacks
from gr.training.trainer import Callback

Config = TypeVar("Config", bound=RunConfig)


class FolderRecipe(Recipe[Config]):
    """Evaluates on all of evaluation.path whichever the split. evaluation_data: None where that is unset."""

    evaluation_data: Any

    def check_split(self, split: Split) -> None:
        if self._settings.path is None:
            raise ConfigError("evaluation.path is unset: name the data folder to evaluate on, evaluation.path=PATH")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, world: World, split: Split) -> Evaluation:
        """measure() of the evaluation data; no metrics where there is no such data."""
        details = {"data": self._settings.path}
        if self.evaluation_data is None:
            return Evaluation({}, details)
        was_training = model.training
        model.eval()
        measured = self.measure(model, world)
        model.train(was_training)
        return replace(measured, details=details | measured.details)

    @abstractmethod
    def measure(self, model: nn.Module, world: World) -> Evaluation:
        """Metrics over all of evaluation_data, of a model in evaluation mode. Collective."""

    def evaluation_callbacks(self, training: Training, shown: Sequence[str], over: str) -> list[Callback]:
        """Evaluates every evaluation.every steps, where that is set. shown: metrics for the log. over: how much data.

        Nothing is selected by it: the model is scored on it at the end.
        """
        if not self._settings.every:
            return []
        evaluation = callbacks.Evaluation(
            lambda: self.evaluate(training.model, training.world, "test").metrics,
            training.checkpointing,
            training.writer,
            every=self._settings.every,
            select_by=None,
            shown=tuple(shown),
            over=over,
        )
        return [evaluation]

    @property
    def _settings(self) -> Any:
        return self.config.evaluation  # type: ignore[attr-defined]

"""A run from its configuration: retrieval, ranking or generative ranking, trained or evaluated."""

from pathlib import Path
from typing import Any, Literal

from gr.config import Experiment, GenerativeConfig, RankingConfig
from gr.dist import World
from gr.experiment import generative, ranking, retrieval
from gr.experiment.folder import run_folder
from gr.ops.backend import force_backend


def train(config: Experiment, world: World) -> dict[str, Any] | None:
    """Trains, resuming where run_dir has a checkpoint; the final report, or None when a signal stopped the run."""
    with run_folder(config, world), force_backend(config.trainer.operators):
        if isinstance(config, RankingConfig):
            return ranking.train(config, world)
        if isinstance(config, GenerativeConfig):
            return generative.train(config, world)
        return retrieval.train(config, world)
    return None  # asked to stop outside the steps


def evaluate(
    config: Experiment, checkpoint: Path, world: World, split: Literal["validation", "test"]
) -> dict[str, Any]:
    """Metrics of a checkpoint, from the checkpoint and the data alone. split: of users' newest events."""
    with force_backend(config.trainer.operators):
        if isinstance(config, RankingConfig):
            return ranking.evaluate(config, checkpoint, world)
        if isinstance(config, GenerativeConfig):
            return generative.evaluate(config, checkpoint, world, split)
        return retrieval.evaluate(config, checkpoint, world, split)


__all__ = ["evaluate", "train"]

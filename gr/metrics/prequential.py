"""Metrics of one task as training goes: of the newest examples, and of all."""

from torch import Tensor

from gr.dist import World
from gr.metrics.ranking import LifetimeMetrics, RankingMetrics


class PrequentialMetrics:
    """RankingMetrics over a window of the newest examples, and under lifetime/ LifetimeMetrics.

    Nothing of them is in checkpoints: both begin again where a run resumes.
    """

    def __init__(self, task: str, world: World, *, window: int) -> None:
        self._window, self._lifetime = RankingMetrics(task, world, window=window), LifetimeMetrics(task, world)

    def update(self, predictions_B: Tensor, labels_B: Tensor) -> None:
        """As RankingMetrics.update: all ranks equally often."""
        self._window.update(predictions_B, labels_B)
        self._lifetime.update(predictions_B, labels_B)

    def compute(self) -> dict[str, float]:
        """As RankingMetrics.compute. Collective."""
        newest = self._window.compute()
        return newest | {f"lifetime/{name}": value for name, value in self._lifetime.compute().items()}

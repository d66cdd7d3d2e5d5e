"""Prequential metrics of one task, over the newest examples and over all: each is scored before it is trained on."""

from torch import Tensor

from gr.dist import World
from gr.metrics.ranking import LifetimeMetrics, RankingMetrics


class PrequentialMetrics:
    """RankingMetrics over a window of the newest examples, and LifetimeMetrics under the prefix lifetime/.

    Checkpoints hold neither: both begin again where a run resumes.
    """

    def __init__(self, task: str, world: World, *, window: int) -> None:
        self._window, self._lifetime = RankingMetrics(task, world, window=window), LifetimeMetrics(task, world)

    def update(self, predictions_B: Tensor, labels_B: Tensor) -> None:
        """Adds examples. All ranks update equally often."""
        self._window.update(predictions_B, labels_B)
        self._lifetime.update(predictions_B, labels_B)

    def compute(self) -> dict[str, float]:
        """Both metrics, on every rank. Collective; raises what RankingMetrics.compute raises."""
        newest = self._window.compute()
        return newest | {f"lifetime/{name}": value for name, value in self._lifetime.compute().items()}

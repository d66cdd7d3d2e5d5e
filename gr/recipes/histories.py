"""The part that recipes on user histories share."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from gr.batch import ITEM_FEATURE
from gr.config.histories import HistoryRunConfig
from gr.data.dataset import Dataset, check_alike
from gr.data.vocabulary import Vocabulary
from gr.dist import World
from gr.errors import ConfigError
from gr.logging import get_logger
from gr.planner.estimate_dense import sequence_flops
from gr.recipes.base import Recipe
from gr.schema import USER_COLUMN, DataSchema

log = get_logger(__name__)
Config = TypeVar("Config", bound=HistoryRunConfig)


class HistoryRecipe(Recipe[Config], Generic[Config]):
    """A model on user histories.

    compared_columns: fields of schema.json that training and evaluation data must share.
    """

    schema: DataSchema
    compared_columns: tuple[str, ...] = ("item_cardinality",)

    @cached_property
    def train_data(self) -> Dataset:
        return Dataset.open(self.config.data.path)

    @cached_property
    def evaluation_data(self) -> Dataset:
        return Dataset.open(self.config.evaluation.path) if self.config.evaluation.path else self.train_data

    def needs_time(self) -> dict[str, str]:
        """The settings that read timestamps, each with the remedy where the data has none."""
        uses_time = self.config.model.tower.uses_time  # type: ignore[attr-defined]
        return {"model.tower.time_bias=true": "set it to false"} if uses_time else {}

    @property
    def table_columns(self) -> int:
        return self.config.model.dim  # type: ignore[attr-defined]

    def check_data(self) -> None:
        self.check_shared_tables()
        path = self.evaluation_data.path
        evaluated = self.config.load_schema(path)
        for schema, folder in ((self.schema, self.folder), (evaluated, path)):
            for setting, remedy in self.needs_time().items():
                if not schema.timestamps:
                    raise ConfigError(f"{setting}, but {folder} has no timestamps: {remedy}")
        check_alike(self.schema, self.folder, evaluated, path, self.compared_columns)

    def user_vocabulary(self) -> Vocabulary:
        """The user ids of the evaluation data."""
        return Vocabulary.open(self.evaluation_data.path, self.evaluation_data.schema, USER_COLUMN)

    def some_user_has(self, events: int) -> bool:
        """Whether a user of the evaluation data has so many. Reads row groups until there is one: mostly the first."""
        data, on_bad_row = self.evaluation_data, self.config.data.on_bad_row
        groups = (data.read_row_group(index, [], on_bad_row) for index in range(len(data.row_groups)))
        return any((group.lengths_B >= events).any() for group in groups)

    def tokens(self, events_N: np.ndarray) -> np.ndarray:
        """Tokens of the tower for examples of so many events."""
        return events_N

    def example_flops(self) -> Callable[[np.ndarray], np.ndarray] | None:
        return self._sequence_flops() if self.config.data.balance else None

    def flops(self) -> Callable[[Any], float]:
        of_examples = self._sequence_flops()
        return lambda batch: float(of_examples(batch.features[ITEM_FEATURE].lengths().numpy()).sum())

    def _sequence_flops(self) -> Callable[[np.ndarray], np.ndarray]:
        inventory = self.config.inventory(self.schema)
        return lambda events_N: sequence_flops(inventory, self.tokens(events_N))

    def count(self, counters: Mapping[str, int], world: World) -> dict[str, float]:
        """The counters of all ranks; what a user should know of them is logged.

        Adds stochastic_length_sparsity where events were left out: their share of all that were in a window, by event
        dropout too.
        """
        total = dict(zip(counters, world.all_reduce_sum([float(n) for n in counters.values()]), strict=True))
        if dropped := total.get("subsampled_tokens"):
            total["stochastic_length_sparsity"] = dropped / (dropped + total["tokens"])
            if world.is_main:
                share = 100 * total["stochastic_length_sparsity"]
                log.info("stochastic length and event dropout left out %.1f %% of the events", share)
        if total["bad_rows"] and world.is_main:
            log.warning("data.on_bad_row=skip emptied %d bad rows; see training_data in report.json", total["bad_rows"])
        return total

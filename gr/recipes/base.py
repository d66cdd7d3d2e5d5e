"""The questions that every kind of experiment answers. gr.experiment asks; a recipe knows no experiment."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gr.config import differences
from gr.config.features import DynamicIds
from gr.config.load import RECIPES
from gr.config.run import RunConfig
from gr.data.parquet import decoding
from gr.data.vocabulary import Vocabulary, check_digest
from gr.dist import World
from gr.errors import CheckpointError, ConfigError, DataError
from gr.metrics.writers import MetricsWriter
from gr.models import build_model
from gr.schema import SCHEMA_FILE, vocabulary_file
from gr.training import callbacks
from gr.training.module import Objective
from gr.training.pipeline import Loader
from gr.training.trainer import Callback

Split = Literal["validation", "test"]
Config = TypeVar("Config", bound=RunConfig)


class TrainingLoader(Loader, Protocol):
    """A loader whose position can be set."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def steps(self, epochs: int) -> int: ...

    def counters(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Evaluation:
    """metrics: of the model; empty where there is nothing to evaluate on, None for what does not exist in the data.

    details: what else the report says; `unmeasured` says why metrics are None, by task.

    arrays: saved beside the report, by name.
    """

    metrics: Mapping[str, float | None]
    details: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request for recommendations.

    k: items a user. holdout: newest events of a user that are left out, to compare with them.
    users, items: Parquet files of the users to recommend to (with an optional column k, which takes the place of k) and
    of the items allowed; None: all. cold: what users get that have no history or are not in the data: nothing, or the
    items that occur most often in training, without a score.
    """

    k: int = 20
    holdout: Literal[0, 1] = 0
    users: Path | None = None
    items: Path | None = None
    cold: Literal["nothing", "popularity"] = "nothing"

    @classmethod
    def of(cls, **fields: Any) -> "Request":
        """Raises ConfigError for a field that is none, or a value that it cannot have."""
        for name in fields.keys() - cls.__annotations__.keys():
            raise ConfigError(f"{name}: is no field of a request; fields: {', '.join(cls.__annotations__)}")
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            fault = error.errors()[0]
            raise ConfigError(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}; fields: {', '.join(cls.__annotations__)}"
            ) from None


@dataclass
class Answers:
    """A stream of tables, each of `schema`, and counts that are whole once it has ended."""

    schema: pa.Schema
    tables: Iterable[pa.Table]
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportTable:
    """Metrics to show: a row a model, a column for each of `columns`."""

    title: str
    rows: Mapping[str, Mapping[str, float | None]]
    columns: Sequence[str]


@dataclass(frozen=True)
class Training:
    """The parts of a run that a recipe's callbacks may use. writer: None on all ranks but the main one."""

    model: nn.Module
    world: World
    objective: Objective
    loader: TrainingLoader
    writer: MetricsWriter | None
    checkpointing: callbacks.Checkpointing


class Recipe(ABC, Generic[Config]):
    """One kind of experiment. `config` and `schema` determine the model; everything else reads data.

    corpus_files: what else of the data folder a model needs to be used. starts_from: the kinds of experiments from
    whose weights a run begins, at step 0, where it has no checkpoint of its own; none: from initial values. added: what
    the names of the dense parameters begin with that such an experiment does not have.
    """

    corpus_files: tuple[str, ...] = ()
    starts_from: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        """folder: has the artifacts: a checkpoint; None: the training data. Raises DataError."""
        self.config = config
        self.folder = Path(config.data.path) if folder is None else folder  # type: ignore[attr-defined]
        self.schema = config.load_schema(self.folder)

    def model(self) -> nn.Module:
        """The single-device model, without storage (on meta)."""
        return build_model(self.config, self.schema)

    @property
    def artifacts(self) -> list[str]:
        """Files of the data folder that a model needs to be used, kept in every checkpoint."""
        return [SCHEMA_FILE, *self.corpus_files, *map(vocabulary_file, self.schema.input_vocabularies)]

    def artifact(self, name: str) -> bytes:
        """The content of one of them. Raises DataError for a vocabulary that is not the one that schema.json names."""
        path = self.folder / name
        with decoding(path):
            content = path.read_bytes()
        expected = {vocabulary_file(column): digest for column, digest in self.schema.input_vocabularies.items()}
        if name in expected:
            check_digest(path, content, expected[name])
        return content

    def vocabulary(self, column: str) -> Vocabulary:
        """The values of a column that the model reads."""
        return Vocabulary.open(self.folder, self.schema, column)

    def check_shared_tables(self) -> None:
        """Raises DataError where the ids of columns that share a table stand for different values."""
        for table, columns in self.config.columns_by_table(self.schema).items():
            for name in columns[1:]:
                if not self.vocabulary(table).agrees(self.vocabulary(name)):
                    raise DataError(
                        f"embeddings.tables.{name}.table={table}: in {self.folder} the ids of {name} and {table} stand "
                        "for different values: unset it, or prepare both columns with one vocabulary"
                    )

    @property
    def has_tables(self) -> bool:
        return bool(self.config.tables(self.schema))

    @property
    def table_columns(self) -> int | None:
        """Columns of the tables that the model reads; those past them are zero. None: all."""
        return None

    @abstractmethod
    def check_data(self) -> None:
        """Opens the data that is there to be read. Raises ConfigError or DataError where the model cannot read it."""

    def check_saved(self, saved: Config, path: str) -> None:
        """Raises CheckpointError where a checkpoint of configuration `saved` is of another model."""
        self._check_same(saved, path, "model")

    def begin(self, model: nn.Module, world: World) -> None:
        """Fills the frozen parameters, once those that are trained have the weights of a checkpoint of starts_from.
        Collective.
        """

    def _check_same(self, saved: Config, path: str, *sections: str) -> None:
        """Raises CheckpointError, naming the keys, where some of these top-level sections differ."""
        changed = {key: both for key, both in differences(saved, self.config).items() if key.split(".")[0] in sections}
        if changed:
            shown = "; ".join(f"{key} is {before} there, {now} now" for key, (before, now) in changed.items())
            raise CheckpointError(f"{path} is of another {' or '.join(sections)}: {shown}. Use another run_dir")
        self._check_ids(saved, path)
        before, now = saved.columns_by_table(self.schema), self.config.columns_by_table(self.schema)
        for table in {**before, **now}:
            if before.get(table) != now.get(table):
                columns = (", ".join(each.get(table, ())) or "no column" for each in (before, now))
                shown = f"table {table} is read by {next(columns)} there, by {next(columns)} now"
                raise CheckpointError(f"{path} is of another model: {shown} (embeddings.tables). Use another run_dir")

    def _check_ids(self, saved: Config, path: str) -> None:
        """Raises CheckpointError where the raw ids of a table have other rows, but for sets that have grown."""
        for table in self.config.columns_by_table(self.schema):
            old, new = (each.embeddings.ids_of(table) for each in (saved, self.config))
            rows = [" ".join(f"{name}={value}" for name, value in each.layout().items()) for each in (old, new)]
            fewer = isinstance(old, DynamicIds) and isinstance(new, DynamicIds) and new.ways < old.ways
            if rows[0] != rows[1] or fewer:
                raise CheckpointError(
                    f"{path} is of another model: embeddings.tables.{table}.ids has {rows[0]} there, {rows[1]} now"
                    f"{' (ways may grow, rows with them)' if fewer else ''}. Use another run_dir"
                )

    @abstractmethod
    def objective(self, world: World) -> Objective:
        """The losses that the steps minimise."""

    @abstractmethod
    def loader(self, world: World) -> TrainingLoader:
        """The training batches of this rank. Raises ConfigError where there are fewer than trainer.steps."""

    def check_steps(self, batches: int, of: str, more: str = "") -> None:
        """Raises ConfigError where one pass has fewer batches than trainer.steps. of: what a batch has. more: what else
        may be done than to take fewer.
        """
        steps = self.config.trainer.steps
        if steps is not None and steps > batches:
            raise ConfigError(
                f"trainer.steps={steps}, but {self.config.data.path} has {batches} batches of {of} for its one pass: "  # type: ignore[attr-defined]
                f"set trainer.steps to {batches} or fewer{more}"
            )

    def example_flops(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """FLOPs of examples by their events, int64 [N] -> float64 [N], to deal them to the ranks; None: not dealt."""
        return None

    def flops(self) -> Callable[[Any], float] | None:
        """FLOPs of the dense part on a batch of one rank, forward and backward, as the planner counts them; None: not
        known.
        """
        return None

    @abstractmethod
    def callbacks(self, training: Training) -> list[Callback]:
        """The callbacks of this recipe, its evaluation included."""

    @abstractmethod
    def check_split(self, split: Split) -> None:
        """Raises ConfigError where a split cannot be evaluated: its targets were trained on, or there is no data."""

    @abstractmethod
    def evaluate(self, model: nn.Module, world: World, split: Split) -> Evaluation:
        """Metrics of a model on one split; the same at every world size. Collective."""

    def recommend(self, model: nn.Module, world: World, request: Request) -> Answers:
        """The best items of this rank's users of the evaluation data, in its order; ranks follow one another.

        Raises ConfigError where the recipe recommends nothing. Collective: all ranks take as many tables.
        """
        raise ConfigError(f"{self.config.kind} models recommend nothing: only retrieval models do")

    def predict(self, model: nn.Module, world: World, file: Path) -> Answers:
        """The rows of a Parquet file with the model's predictions beside them, this rank's part in its order.

        Raises ConfigError where the recipe predicts nothing. Collective: all ranks take as many tables.
        """
        raise ConfigError(f"{self.config.kind} models predict nothing of rows: only ranking and click models do")

    def embed(self, model: nn.Module, world: World) -> dict[str, Answers]:
        """Vectors by the name of their file, this rank's part. Collective, as predict is."""
        raise ConfigError(f"{self.config.kind} models have no vectors to look up: only retrieval models do")

    def comparisons(self, split: Split) -> dict[str, Any]:
        """Further parts of the report, to compare the model with; made on the main rank once the report is written."""
        return {}

    def count(self, counters: Mapping[str, int], world: World) -> dict[str, float]:
        """The loader's counters, for the report. Collective."""
        return dict(counters)

    @classmethod
    @abstractmethod
    def tables(cls, report: Mapping[str, Any]) -> list[ReportTable] | str:
        """A report's metrics to show, or one line that says why there are none."""

    @classmethod
    def verdict(cls, report: Mapping[str, Any]) -> str | None:
        """The last line of a report, where it says what should not be overlooked; None: nothing."""
        return None


def open_recipe(config: Config, folder: Path | None = None) -> Recipe[Config]:
    """The recipe that `config` is for, on its training data or on what a checkpoint keeps of it."""
    return RECIPES.target(config)(config, folder)


def recipe_class(kind: str) -> type[Recipe]:
    """The recipe of a task.kind."""
    return RECIPES.target_of(kind)

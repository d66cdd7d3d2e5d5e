"""The parts that every kind of experiment has: run folder, seed, tables, optimizers, planner, trainer, checkpoints.

Every field is a path a user can write in YAML or override on the command line (`trainer.steps=800`). No torch.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from gr.config.base import PositiveFloat, Precision, Registry, Section
from gr.config.features import TableDtype, TableOptions, columns_by_table
from gr.config.inventory import (
    AnyShardingType,
    DLRMDense,
    GivenDense,
    InventoryConfig,
    LossInventory,
    TableConfig,
    TowerDense,
    within_limits,
)
from gr.config.optim import (
    DENSE_OPTIMIZERS,
    TABLE_OPTIMIZERS,
    Adam,
    DenseAdamW,
    DenseOptimizerConfig,
    TableOptimizerConfig,
)
from gr.errors import ConfigError

TableInit = Literal["truncated_normal", "uniform_rows"]


class EmbeddingsConfig(Section):
    dtype: TableDtype = "fp32"
    init: TableInit = Field(
        "truncated_normal",
        description="Keyed on (seed, table, row). uniform_rows is DLRM's: within 1/sqrt(rows) of zero.",
    )
    init_std: PositiveFloat = Field(0.02, description="Of truncated_normal, before it is cut at two deviations.")
    optimizer: Annotated[TableOptimizerConfig, TABLE_OPTIMIZERS] = Adam()
    tables: dict[str, TableOptions] = Field({}, description="By column: a table that differs from all others.")

    def of(self, table: str) -> TableOptions:
        """What a table has of its own."""
        return self.tables.get(table, TableOptions())

    def optimizer_of(self, table: str) -> TableOptimizerConfig:
        return self.of(table).optimizer or self.optimizer


class PlannerConfig(Section):
    sharding: Literal["auto"] | AnyShardingType = Field("auto", description="For every table; auto asks the planner.")
    tables: dict[str, AnyShardingType] = Field({}, description="Sharding type of single tables, by name.")
    plan: str | None = Field(None, description="Plan to train with, as written by `gr plan --json`; unset makes one.")
    replan: bool = Field(
        False, description="Make another plan where that of `plan` is for another machine: elastic runs change theirs."
    )
    topology: str | None = Field(
        None,
        description="Hardware, by name or as a YAML file; unset: cpu, or what the GPU is. The ranks are the run's.",
    )


class ProfilerConfig(Section):
    start: NonNegativeInt = Field(10, description="First step recorded.")
    steps: PositiveInt = Field(5, description="Steps recorded.")


class TimeoutsConfig(Section):
    """Seconds after which a rank that stands still writes its stacks to run_dir/logs and ends."""

    start: PositiveFloat = Field(1800, description="From the first process until training begins, with loading.")
    step: PositiveFloat = Field(600, description="One step, with the wait for its batch.")
    checkpoint: PositiveFloat = 1800
    evaluation: PositiveFloat = 3600


class TrainerConfig(Section):
    renamed: ClassVar[dict[str, str]] = {"operators": "kernels"}

    steps: PositiveInt
    global_batch_size: PositiveInt = Field(128, description="Examples a step, over all ranks.")
    log_every: PositiveInt = Field(20, description="Steps between lines of metrics.")
    precision: Precision = Field("fp32", description="bf16 runs the tower under autocast.")
    kernels: Literal["auto", "native", "triton", "torch"] = Field(
        "auto",
        description="Which implementation of gr.ops runs: C++ on CPU where it can be built, Triton on CUDA (auto); "
        "one of them, or an error; or plain PyTorch.",
    )
    profiler: ProfilerConfig | None = None
    timeouts: TimeoutsConfig = TimeoutsConfig()


class CheckpointConfig(Section):
    every: PositiveInt | None = Field(
        1000, description="Steps between checkpoints; null saves at evaluations and at the end only."
    )
    keep_last: PositiveInt = 2
    asynchronous: bool = False
    load_from: str | None = Field(None, description="Checkpoint to continue from when run_dir has none.")


class CallbackConfig(Section):
    """A callback of a plugin."""

    kind: str


# kind -> its config and the gr.training.trainer.Callback that it configures: `Callback(config)`.
CALLBACKS = Registry("callback")


class RunConfig(Section):
    """An experiment. A recipe's own configuration adds data, model, task and evaluation.

    Without torch, it says all that the planner asks: which tables the model has on data of a schema, and what its
    dense part costs. model_target: "module:name" of what builds the model, `name(config, schema)`. saved_target: of the
    class that gr.load returns.
    """

    model_target: ClassVar[str]
    saved_target: ClassVar[str]

    run_dir: str = Field(description="Folder of this run: config, logs, metrics, checkpoints.")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    plugins: tuple[str, ...] = Field(
        (), description="Modules to import first, which register towers, optimizers, recipes or callbacks of their own."
    )
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    optimizer: Annotated[DenseOptimizerConfig, DENSE_OPTIMIZERS] = DenseAdamW()
    planner: PlannerConfig = PlannerConfig()
    trainer: TrainerConfig
    callbacks: tuple[Annotated[CallbackConfig, CALLBACKS], ...] = Field((), description="Callbacks of plugins.")
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def kind(self) -> str:
        """task.kind: which recipe this is for."""
        return self.task.kind  # type: ignore[attr-defined]

    @abstractmethod
    def load_schema(self, folder: Path | None = None) -> Any:
        """schema.json of the training data, or of another folder that has one, with the columns that the model reads.

        Raises DataError, and ConfigError for a column that is not there.
        """

    @abstractmethod
    def id_columns(self, schema: Any) -> Mapping[str, int]:
        """The columns of ids that the model reads, in its order, each with the rows of its table."""

    def columns_by_table(self, schema: Any) -> dict[str, tuple[str, ...]]:
        """The columns of ids that read each table, by its name. Raises ConfigError where embeddings.tables misfits."""
        return columns_by_table(self.id_columns(schema), self.embeddings.tables)

    @abstractmethod
    def tables(self, schema: Any) -> tuple[TableConfig, ...]:
        """The model's tables on data of `schema`: the one list that the model and the planner are made from."""

    @abstractmethod
    def dense_part(self, schema: Any) -> TowerDense | DLRMDense | GivenDense:
        """The model without its tables, as the planner counts it."""

    @abstractmethod
    def loss(self, schema: Any) -> LossInventory:
        """The scores that the loss computes, as the planner counts them."""

    @within_limits()
    def inventory(self, schema: Any) -> InventoryConfig:
        """The planner's input. Raises ConfigError for sizes beyond what it can count."""
        return InventoryConfig(
            name=self.kind,
            global_batch_size=self.trainer.global_batch_size,
            precision=self.trainer.precision,
            dense_optimizer=self.optimizer.kind,
            tables=self.tables(schema),
            dense=self.dense_part(schema),
            loss=self.loss(schema),
        )

    @within_limits()
    def table(self, name: str, rows: int, **fields: Any) -> TableConfig:
        """A table with its dtype and optimizer. fields: as in TableConfig."""
        dtype = self.embeddings.of(name).dtype or self.embeddings.dtype
        return TableConfig(
            name=name, rows=rows, dtype=dtype, optimizer=self.embeddings.optimizer_of(name).kind, **fields
        )

    def batch_sizes(self) -> Mapping[str, int]:
        """The numbers that are dealt evenly to the ranks, by the names of their keys."""
        return {"trainer.global_batch_size": self.trainer.global_batch_size}

    def check_ranks(self, ranks: int) -> None:
        """Raises ConfigError where a batch cannot be dealt evenly to `ranks` ranks."""
        for name, value in self.batch_sizes().items():
            if value % ranks:
                raise ConfigError(
                    f"{name}={value} is not divisible by the {ranks} ranks of this run: use a number of ranks that "
                    f"divides it, or set {name} to a multiple of {ranks}"
                )

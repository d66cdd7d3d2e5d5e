"""The parts that every kind of experiment has: run folder, seed, tables, optimizers, planner, trainer, checkpoints.

Every field is a path a user can write in YAML or override on the command line (`trainer.steps=800`). No torch.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gr.config.base import Count, Fraction, PathText, PositiveFloat, Precision, Registry, Section
from gr.config.features import ComputeKernel, DenseIds, Rounding, TableDtype, TableIds, TableOptions, columns_by_table
from gr.config.inventory import (
    DLRMDense,
    GivenDense,
    InventoryConfig,
    LossInventory,
    TableConfig,
    TowerDense,
    kernels_of,
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
from gr.config.planner import PlannerConfig
from gr.errors import ConfigError
from gr.schema import LARGEST_DENSE

TableInit = Literal["truncated_normal", "uniform_rows"]


class EmbeddingsConfig(Section):
    dtype: TableDtype = Field("fp32", description="Of the tables' rows in memory.")
    rounding: Rounding = Field(
        "stochastic",
        description="Of updates to fp16 rows: up or down by odds that make the mean exact, drawn from (seed, table, "
        "step, row, column). nearest loses every update below half a step of fp16.",
    )
    init: TableInit = Field(
        "truncated_normal",
        description="Keyed on (seed, table, row). uniform_rows is DLRM's: within 1/sqrt(rows) of zero.",
    )
    init_std: PositiveFloat = Field(0.02, description="Of truncated_normal, before it is cut at two deviations.")
    optimizer: Annotated[TableOptimizerConfig, TABLE_OPTIMIZERS] = Field(
        Adam(), description="Updates the tables' rows."
    )
    compute_kernel: ComputeKernel = Field(
        "fused",
        description="Home of the rows on CUDA. fused: HBM. fused_uvm: host memory. fused_uvm_caching: host memory, "
        "with a cache in HBM. auto: as the planner finds.",
    )
    cache_load_factor: Fraction = Field(0.2, description="Share of the rows in HBM under fused_uvm_caching.")
    tables: dict[str, TableOptions] = Field({}, description="By column: a table that differs from all others.")

    def of(self, table: str) -> TableOptions:
        """The options of one table, all unset where it is as the others are."""
        return self.tables.get(table, TableOptions())

    def optimizer_of(self, table: str) -> TableOptimizerConfig:
        return self.of(table).optimizer or self.optimizer

    def ids_of(self, table: str) -> TableIds:
        return self.of(table).ids or DenseIds()

    def rounding_of(self, table: str) -> Rounding | None:
        """None for a table in fp32, which is not rounded."""
        own = self.of(table)
        return None if (own.dtype or self.dtype) == "fp32" else own.rounding or self.rounding


class DenseConfig(Section):
    """How the dense part lies on the ranks. Tables are the planner's: no strategy of the dense part touches them."""

    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp: every rank has a copy. fsdp: each rank has its share of the weights, gradients and optimizer "
        "states of the tower and the heads, and gathers one layer at a time (FSDP2). Both train the same model.",
    )
    tensor_parallel: PositiveInt = Field(
        1,
        description="Neighbouring ranks that hold each matrix of a Llama tower together, and compute on the tokens of "
        "all of them. Tables stay sharded over all ranks. Beyond one such group it takes strategy=fsdp.",
    )
    gathered: Precision = Field(
        "fp32",
        description="What a layer is gathered in under fsdp. bf16 halves those bytes; weights stay fp32 where they are "
        "updated, and gradients are summed in fp32. Needs trainer.precision=bf16.",
    )
    activation_checkpointing: Literal["none", "layer"] = Field(
        "none", description="layer: the backward pass computes each layer of the tower again instead of keeping it."
    )

    @model_validator(mode="after")
    def _only_fsdp_gathers(self):
        if self.gathered == "bf16" and self.strategy != "fsdp":
            raise ValueError(f"gathered=bf16, but strategy={self.strategy} gathers no layer: set strategy=fsdp")
        return self

    def check_ranks(self, ranks: int) -> None:
        """Raises ConfigError where the dense part cannot lie on `ranks` ranks."""
        if self.strategy == "fsdp" and ranks == 1:
            raise ConfigError(
                "dense.strategy=fsdp, but this run has 1 rank, which shares with no other: start 2 or more "
                "(torchrun --nproc-per-node 2), or set dense.strategy=ddp"
            )
        if ranks % self.tensor_parallel:
            raise ConfigError(
                f"dense.tensor_parallel={self.tensor_parallel} does not divide the {ranks} ranks of this run: use a "
                f"multiple of {self.tensor_parallel} ranks, or set it to a divisor of {ranks}"
            )
        if self.strategy == "ddp" and self.tensor_parallel not in (1, ranks):
            raise ConfigError(
                f"dense.tensor_parallel={self.tensor_parallel} on {ranks} ranks makes "
                f"{ranks // self.tensor_parallel} groups: set dense.strategy=fsdp, which shares the tower among them"
            )


class ProfilerConfig(Section):
    start: NonNegativeInt = Field(10, description="First step recorded.")
    steps: PositiveInt = Field(5, description="Steps recorded.")


class TimeoutsConfig(Section):
    """Seconds after which a rank that stands still writes its stacks to run_dir/logs and ends."""

    start: PositiveFloat = Field(1800, description="From the first process until training begins, with loading.")
    step: PositiveFloat = Field(600, description="One step, with the wait for its batch.")
    checkpoint: PositiveFloat = Field(1800, description="Saving one checkpoint.")
    evaluation: PositiveFloat = Field(3600, description="One evaluation, or the final report.")


class WriterConfig(Section):
    """A place that metrics go to, beside metrics.jsonl. package: the one it needs, of the extra of the kind's name."""

    kind: str
    package: ClassVar[str] = ""


class TensorBoardConfig(WriterConfig):
    """TensorBoard, in run_dir/tensorboard."""

    kind: Literal["tensorboard"] = "tensorboard"


class WandbConfig(WriterConfig):
    """Weights & Biases (`pip install gr[wandb]`), with files in run_dir/wandb."""

    kind: Literal["wandb"] = "wandb"
    project: str = Field("gr", description="Project that the run belongs to.")
    mode: Literal["online", "offline"] = Field("online", description="offline: for `wandb sync` later.")
    package: ClassVar[str] = "wandb"


class MLflowConfig(WriterConfig):
    """MLflow (`pip install gr[mlflow]`)."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(None, description="Tracking server, as http://host:5000; unset: MLFLOW_TRACKING_URI.")
    experiment: str = Field("gr", description="Experiment that the run belongs to; made where it is missing.")
    package: ClassVar[str] = "mlflow"


# kind -> its config and the gr.metrics.trackers.Tracker that it configures: `Tracker(config, run, steps_done)`.
WRITERS = Registry("writer")
WRITERS.add(TensorBoardConfig, "gr.metrics.trackers:TensorBoard")
WRITERS.add(WandbConfig, "gr.metrics.trackers:Wandb")
WRITERS.add(MLflowConfig, "gr.metrics.trackers:MLflow")


class TrainerConfig(Section):
    renamed: ClassVar[dict[str, str]] = {"operators": "kernels"}

    steps: PositiveInt | None = Field(None, description="Steps of the run; this or epochs is set.")
    epochs: PositiveInt | None = Field(
        None, description="Passes over the training data, in place of steps; the last step may begin another pass."
    )
    global_batch_size: PositiveInt = Field(128, description="Examples a step, over all ranks.")
    log_every: PositiveInt = Field(20, description="Steps between lines of metrics.")
    precision: Precision = Field("fp32", description="bf16 runs the tower under autocast.")
    kernels: Literal["auto", "native", "triton", "torch"] = Field(
        "auto",
        description="Which implementation of gr.ops runs: C++ on CPU where it can be built, Triton on CUDA (auto); "
        "one of them, or an error; or plain PyTorch.",
    )
    writers: tuple[Annotated[WriterConfig, WRITERS], ...] = Field(
        (TensorBoardConfig(),), description="Where metrics go beside metrics.jsonl, with the configuration."
    )
    profiler: ProfilerConfig | None = Field(None, description="Records some steps in run_dir/profile; unset: none.")
    timeouts: TimeoutsConfig = Field(TimeoutsConfig(), description="Seconds that each part of a run may take.")

    @model_validator(mode="after")
    def _steps_or_epochs(self):
        if self.steps is None and self.epochs is None:
            raise ValueError("steps and epochs are both unset: set one of them")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: set one of them, the other to null")
        return self


class CheckpointConfig(Section):
    every: PositiveInt | None = Field(
        1000, description="Steps between checkpoints; null saves at evaluations and at the end only."
    )
    keep_last: PositiveInt = Field(2, description="Newest checkpoints that stay, beside the best one.")
    asynchronous: bool = Field(
        False, description="Write while training goes on, from a copy of tables, parameters and states in host memory."
    )
    load_from: PathText | None = Field(None, description="Checkpoint to continue from when run_dir has none.")
    load_parts: tuple[str, ...] | None = Field(
        None, min_length=1, description="Parts of load_from to begin another run with: `dense`, tables by name."
    )

    @model_validator(mode="after")
    def _parts_are_of_a_checkpoint(self):
        if self.load_parts and self.load_from is None:
            raise ValueError("load_parts needs load_from: the checkpoint to take them of")
        return self


class FolderEvaluationConfig(Section):
    """Evaluation of a kind that holds out a folder, and not events of its users."""

    path: PathText | None = Field(None, description="Data folder to evaluate on; unset: nothing is evaluated.")
    every: Count | None = Field(None, description="Steps between evaluations; unset: only at the end.")

    @model_validator(mode="after")
    def _every_needs_data(self):
        if self.every is not None and self.path is None:
            raise ValueError("every needs path: the data to evaluate on")
        return self


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

    run_dir: PathText = Field(description="Folder of this run: config, logs, metrics, checkpoints.")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(
        1, description="Determines initial values, the order of the data, negatives and dropout."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one.")
    plugins: tuple[str, ...] = Field(
        (), description="Modules to import first, which register towers, optimizers, recipes or callbacks of their own."
    )
    embeddings: EmbeddingsConfig = Field(EmbeddingsConfig(), description="The tables and their optimizer.")
    optimizer: Annotated[DenseOptimizerConfig, DENSE_OPTIMIZERS] = Field(
        DenseAdamW(), description="Updates the dense parameters."
    )
    planner: PlannerConfig = Field(PlannerConfig(), description="How tables are sharded over the ranks.")
    dense: DenseConfig = Field(DenseConfig(), description="How the dense part lies on the ranks.")
    trainer: TrainerConfig = Field(description="The steps: how many, how large, with what precision and kernels.")
    callbacks: tuple[Annotated[CallbackConfig, CALLBACKS], ...] = Field((), description="Callbacks of plugins.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When checkpoints are saved and which stay.")

    @model_validator(mode="after")
    def _gathered_as_it_is_computed(self):
        if self.dense.gathered == "bf16" and self.trainer.precision != "bf16":
            raise ValueError(
                "dense.gathered=bf16, but trainer.precision=fp32 computes in fp32: set trainer.precision=bf16"
            )
        return self

    @property
    def kind(self) -> str:
        """task.kind: which recipe this is for."""
        return self.task.kind  # type: ignore[attr-defined]

    @property
    def model_phrase(self) -> str:
        """The model in a phrase, for the log."""
        return self.kind

    @abstractmethod
    def load_schema(self, folder: Path | None = None) -> Any:
        """schema.json of the training data, or of another folder that has one, with the columns that the model reads.

        Raises DataError, and ConfigError for a column that is not there.
        """

    def planning_schema(self) -> Any:
        """The schema from which sizes are counted to plan; as load_schema, where they depend on the data."""
        return self.load_schema()

    @abstractmethod
    def id_columns(self, schema: Any) -> Mapping[str, int]:
        """The columns of ids that the model reads, in its order, each with the rows of its table."""

    def reasons(self, schema: Any) -> list[str]:
        """A line for each value that follows from the data, with its reason."""
        return []

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
            comm_dtype=self.planner.comm_dtype,
            index_dedup=self.planner.index_dedup,
            groups=self.planner.groups,
            sync_interval=self.planner.sync_interval,
            dense_optimizer=self.optimizer.kind,
            dense_parallel=self.dense.strategy,
            tensor_parallel=self.dense.tensor_parallel,
            dense_gathered=self.dense.gathered,
            activation_checkpointing=self.dense.activation_checkpointing,
            tables=self.tables(schema),
            dense=self.dense_part(schema),
            loss=self.loss(schema),
        )

    @within_limits()
    def table(self, name: str, rows: int, **fields: Any) -> TableConfig:
        """A table with its rows, dtype, rounding and optimizer. rows: of dense ids. fields: as in TableConfig."""
        own = self.embeddings.of(name)
        dtype, rounding = own.dtype or self.embeddings.dtype, own.rounding or self.embeddings.rounding
        optimizer, ids = self.embeddings.optimizer_of(name), self.embeddings.ids_of(name)
        kernel = own.compute_kernel or self.embeddings.compute_kernel
        if ids.kind == "dense" and rows > LARGEST_DENSE:
            raise ConfigError(
                f"{name} has raw ids (schema.json: up to {rows - 1}): set embeddings.tables.{name}.ids to "
                "{kind: dynamic, rows: ROWS}, or hashed, or leave the column out of model.features"
            )
        return TableConfig(
            name=name,
            rows=rows if ids.kind == "dense" else ids.rows,
            ids=ids.kind,
            dtype=dtype,
            rounding=rounding,
            optimizer=optimizer.kind,
            state=optimizer.state,
            state_dtype=optimizer.state_dtype,
            kernels=kernels_of(name, ids, kernel),
            cache_load_factor=own.cache_load_factor or self.embeddings.cache_load_factor,
            **fields,
        )

    def batch_sizes(self) -> Mapping[str, int]:
        """The numbers that are dealt evenly to the ranks, by the names of their keys."""
        return {"trainer.global_batch_size": self.trainer.global_batch_size}

    def check_ranks(self, ranks: int) -> None:
        """Raises ConfigError where a batch or the dense part cannot be dealt to `ranks` ranks."""
        self.planner.check_ranks(ranks)
        self.dense.check_ranks(ranks)
        for name, value in self.batch_sizes().items():
            if value % ranks:
                raise ConfigError(
                    f"{name}={value} is not divisible by the {ranks} ranks of this run: use a number of ranks that "
                    f"divides it, or set {name} to a multiple of {ranks}"
                )

"""The planner's description of a model: its tables, its dense part, its batch. No weights, no data, no torch.

`gr plan` reads one from YAML (configs/scale), from a bare list of tables (JSON, Parquet), or derives one from an
experiment.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, cast, get_args, overload

from pydantic import AfterValidator, Field, ValidationError, model_validator

from gr.config.base import LARGEST, Count, CountOrNone, Fraction, Precision, Registry, Section
from gr.config.dlrm import ROW_MULTIPLE, DLRMConfig
from gr.config.features import ComputeKernel, Rounding, TableIds
from gr.config.optim import DENSE_OPTIMIZERS, TABLE_OPTIMIZERS, StateDtype, StateHome, TableOptimizerConfig
from gr.config.towers import TOWERS, TowerConfig
from gr.config.yaml import describe
from gr.errors import ConfigError

AnyShardingType = Literal[
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
SHARDING_TYPES: tuple[AnyShardingType, ...] = get_args(AnyShardingType)
SEQUENCE_TYPES: tuple[AnyShardingType, ...] = ("data_parallel", "table_wise", "column_wise", "row_wise")
ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")  # which cut rows
Kernel = Literal["dense", "fused", "fused_uvm", "fused_uvm_caching"]
INT8_BLOCK = 32  # columns that share a scale when vectors travel as int8 (fbgemm_gpu.quantize_comm)
FUSED_KERNELS: tuple[Kernel, ...] = ("fused", "fused_uvm", "fused_uvm_caching")
# dtypes of tables, and how their updates are rounded, that fbgemm's fused kernels have on CPU.
_FUSED_ON_CPU = {("fp32", "stochastic"), ("fp32", "nearest"), ("fp16", "nearest")}
UNIFORM_MISSES = 0.8  # of a cache of the hottest fifth: no other ids miss it more often
# Limits far above any model, as LARGEST is.
WIDEST = 2**20  # columns of a table
LARGEST_WORLD = 2**20
MOST_IDS = 1e9  # an example reads
LARGEST_TOTAL = 1e30  # FLOPs, bytes or scores of an example
STEEPEST = 64.0  # Zipf exponent: all draws but 1e-19 read the first row
Length = Annotated[float, Field(gt=0.0, le=LARGEST)]
Total = Annotated[float, Field(ge=0.0, le=LARGEST_TOTAL)]
Rank = Annotated[int, Field(ge=0, lt=LARGEST_WORLD)]


def _registered(registry: Registry) -> Callable[[str], str]:
    def check(kind: str) -> str:
        if kind not in registry:
            raise ValueError(f"{kind!r} is no {registry.what}; use {', '.join(registry)}")
        return kind

    return check


@contextmanager
def within_limits() -> Iterator[None]:
    """An experiment's sizes may be beyond what the planner counts. Raises ConfigError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"the planner cannot count this experiment: {where}: {first['msg'].lower()}, got {describe(first['input'])}"
        ) from None


class TableConfig(Section):
    """One embedding table and how it is read."""

    name: Annotated[str, Field(min_length=1)]
    rows: Count = Field(description="E: rows.")
    ids: Literal["dense", "hashed", "dynamic"] = Field(
        "dense", description="embeddings.tables.COLUMN.ids of an experiment; dynamic takes 16 bytes a row."
    )
    dim: Annotated[int, Field(gt=0, le=WIDEST, multiple_of=ROW_MULTIPLE)] = Field(description="Columns stored.")
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    rounding: Rounding = Field("stochastic", description="Of updates to rows that are not fp32.")
    kind: Literal["pooled", "sequence"] = Field("pooled", description="EmbeddingBagCollection or EmbeddingCollection.")
    pooling: Literal["sum", "mean"] = Field("sum", description="Of pooled tables.")
    features: Count = Field(1, description="Features that read the table.")
    ids_per_example: Annotated[float, Field(gt=0.0, le=MOST_IDS)] = Field(
        1.0, description="Mean ids an example reads, over all its features."
    )
    ids_per_step: Annotated[float, Field(ge=0.0, le=LARGEST)] = Field(
        0.0,
        description="Ids a rank reads a step whatever its batch, such as shared negatives; beside the examples'. They "
        "differ from one another, and lie evenly over the table.",
    )
    skew: Annotated[float, Field(ge=0.0, le=STEEPEST)] = Field(
        0.0, description="Zipf exponent of the ids; 0 is uniform."
    )
    cacheability: Annotated[float, Field(ge=0.0, le=UNIFORM_MISSES)] | None = Field(
        None,
        description="Share of lookups missed by a cache of the hottest fifth of the rows: 0 caches well, 0.8 is "
        "uniform. Unset: from skew.",
    )
    optimizer: Annotated[str, AfterValidator(_registered(TABLE_OPTIMIZERS))] = Field(
        "rowwise_adagrad", description="A kind of embeddings.optimizer."
    )
    state: StateHome = Field("device", description="Home of the optimizer's states of every element; host: fused only.")
    state_dtype: StateDtype = Field("fp32", description="Of the optimizer's states of every element.")
    sharding_types: tuple[AnyShardingType, ...] | None = Field(None, description="Allowed; unset: all that exist.")
    kernels: tuple[Kernel, ...] = Field(
        ("fused",), description="Allowed: fused keeps rows in HBM, fused_uvm on the host, fused_uvm_caching both."
    )
    cache_load_factor: Fraction = Field(0.2, description="Share of the rows in HBM under fused_uvm_caching.")
    ranks: tuple[Rank, ...] | None = Field(None, description="Ranks that may hold it; unset: any.")
    min_shards: Count = 1
    max_shards: Count | None = None

    @model_validator(mode="after")
    def _sharding_types_are_valid(self):
        valid = self.valid_sharding_types()
        if wrong := sorted(set(self.sharding_types or ()) - set(valid)):
            raise ValueError(f"{', '.join(wrong)} {self.why_invalid(wrong[0])}; use {', '.join(valid)}")
        if fault := self.optimizer_config.state_fault(self.optimizer, self.state, self.state_dtype):
            raise ValueError(fault)
        if self.max_shards is not None and self.max_shards < self.min_shards:
            raise ValueError(f"max_shards={self.max_shards} is below min_shards={self.min_shards}")
        return self

    def valid_sharding_types(self) -> tuple[AnyShardingType, ...]:
        """The sharding types that exist for the table and compute the right numbers: see sharding_types_of."""
        return sharding_types_of(self.kind, self.pooling)

    def is_fused_on_cpu(self) -> bool:
        """Whether fbgemm updates the table in backward on CPU, too, where it rounds fp16 to nearest and has no bf16."""
        return self.optimizer_config.fused_on_cpu and (self.dtype, self.rounding) in _FUSED_ON_CPU

    @property
    def optimizer_config(self) -> type[TableOptimizerConfig]:
        """The class of its optimizer's section, which says what states that keeps."""
        return cast(type[TableOptimizerConfig], TABLE_OPTIMIZERS.config(self.optimizer))

    @property
    def has_plain_states(self) -> bool:
        """Whether its states are where and what dense kernels have: theirs are fp32, on the device."""
        return (self.state, self.state_dtype) == ("device", "fp32")

    def why_invalid(self, sharding_type: str) -> str:
        """Why `sharding_type` is not among valid_sharding_types()."""
        if self.kind == "sequence" and sharding_type not in SEQUENCE_TYPES:
            return "does not exist for sequence tables"
        return f"computes wrong results with pooling={self.pooling} in torchrec 1.8"


def kernels_of(table: str, ids: TableIds, kernel: ComputeKernel) -> tuple[Kernel, ...]:
    """The kernels that a table may have, of those that its configuration names. Raises ConfigError where none is left.

    A dynamic row that is handed over is written to the table itself, beside which a cache would keep the old one.
    """
    named = FUSED_KERNELS if kernel == "auto" else (kernel,)
    allowed = tuple(each for each in named if ids.kind != "dynamic" or each != "fused_uvm_caching")
    if not allowed:
        raise ConfigError(f"embeddings.tables.{table}: dynamic ids have no {kernel}: take fused_uvm or fused")
    return allowed


def sharding_types_of(kind: str, pooling: str) -> tuple[AnyShardingType, ...]:
    """The one rule of which sharding type is valid for which table, by its kind and pooling.

    TorchRec's EmbeddingCollection knows SEQUENCE_TYPES only (torchrec/distributed/embedding.py). Under grid_shard
    TorchRec 1.8 adds the means over each shard's rows (_pooling_type_to_rs_features has none): docs/design/planner.md.
    """
    if kind == "sequence":
        return SEQUENCE_TYPES
    return tuple(name for name in SHARDING_TYPES if (name, pooling) != ("grid_shard", "mean"))


class CommDtype(Section):
    """The types in which vectors of tables, and their gradients, travel between ranks. Both ends compute in fp32."""

    forward: Literal["fp32", "fp16", "bf16", "int8"] = Field("fp32", description="Of the vectors.")
    backward: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="Of their gradients; fp16 is not offered, as gradients of a mean over a large batch fall below its "
        "least number, and bf16 takes the same bytes.",
    )

    def fault(self, kind: str, sharding_type: str, width: int) -> str | None:
        """Why a table cannot be sharded so, or None. kind: of TableConfig. width: columns of its shards.

        A pooled table that is cut by rows adds its parts up on the way (reduce-scatter), and sums of int8 are none.
        """
        if "int8" not in (self.forward, self.backward) or sharding_type == "data_parallel":
            return None
        if kind == "pooled" and sharding_type in ROW_TYPES:
            return f"{sharding_type} adds vectors up on the way, which comm_dtype int8 cannot; use fp16 or bf16"
        if width % INT8_BLOCK:
            return f"comm_dtype int8 takes shards of a multiple of {INT8_BLOCK} columns, not {width}; use fp16 or bf16"
        return None


class TowerDense(Section):
    """A tower over sequences of tokens (gr/config/towers.py)."""

    kind: Literal["tower"] = "tower"
    tower: Annotated[TowerConfig, TOWERS]
    dim: Count = Field(description="D: model width.")
    mean_length: Length = Field(description="Tokens of a mean example.")
    max_length: Count = Field(description="N: tokens of the longest example.")
    other_parameters: CountOrNone = Field(0, description="Beside the tower: positions, heads and the like.")
    replicated_parameters: CountOrNone = Field(
        0, description="Of other_parameters, those that every rank has under fsdp too: all but the heads'."
    )

    @model_validator(mode="after")
    def _fits(self):
        if self.replicated_parameters > self.other_parameters:
            raise ValueError(
                f"replicated_parameters={self.replicated_parameters} are among other_parameters, which are "
                f"{self.other_parameters}"
            )
        if self.mean_length > self.max_length:
            raise ValueError(f"mean_length={self.mean_length:g} is above max_length={self.max_length}")
        self.tower.check_width(self.dim)
        return self


class DLRMDense(DLRMConfig):
    """DLRM's dense part, configured as in an experiment."""

    renamed: ClassVar[dict[str, str]] = {
        "dcn_layers": "interaction.layers",
        "dcn_rank": "interaction.rank",
        "self_interaction": "interaction.self_interaction",
        "branch1": "interaction.branch1",
        "branch2": "interaction.branch2",
    }

    dense_features: CountOrNone = 13

    @model_validator(mode="after")
    def _bottom_reads_dense_features(self):
        if fault := self.dense_fault(self.dense_features):
            raise ValueError(fault)
        return self


class GivenDense(Section):
    """A dense part described by its totals, for models of another house."""

    kind: Literal["given"] = "given"
    parameters: CountOrNone = 0
    forward_flops_per_example: Total = 0.0
    activation_bytes_per_example: Total = 0.0


class LossInventory(Section):
    """Scores of the loss: of the target and its negatives at every token, or one a task."""

    scores_per_example: Total = Field(0.0, description="Logits computed for an example.")
    tokens_at_once: Count | None = Field(
        None, description="Tokens whose scores are in memory together, in one buffer (chunked losses); unset: all."
    )


class InventoryConfig(Section):
    """Everything the planner counts, for one training job."""

    renamed: ClassVar[dict[str, str]] = {
        f"dense.kind={kind}": "{kind: tower, tower: {kind: KIND, layers: ...}, dim: ..., mean_length: ...}"
        for kind in ("hstu", "transformer")
    } | {
        "dense.strategy": "dense_parallel",
        "dense.tensor_parallel": "tensor_parallel",
        "dense.gathered": "dense_gathered",
        "dense.activation_checkpointing": "activation_checkpointing",
    }

    name: str = "model"
    rank_batch_size: Count | None = Field(None, description="B: examples a step on each rank.")
    global_batch_size: Count | None = Field(None, description="Examples a step over all ranks.")
    precision: Precision = Field("bf16", description="Of the dense part's activations.")
    comm_dtype: CommDtype = Field(CommDtype(), description="planner.comm_dtype of an experiment.")
    groups: Count = Field(1, description="planner.groups of an experiment.")
    sync_interval: Count = Field(1, description="planner.sync_interval of an experiment.")
    index_dedup: bool = Field(
        False, description="planner.index_dedup of an experiment: a rank asks for a row of a sequence table once."
    )
    dense_efficiency: Fraction = Field(
        0.5,
        description="Of the topology's FLOP/s, which are those of large matrix products, that the dense part reaches; "
        "0.47 in NVIDIA's published HSTU training on H100 (34.5 % of peak).",
    )
    dense_optimizer: Annotated[str, AfterValidator(_registered(DENSE_OPTIMIZERS))] = Field(
        "adamw", description="A kind of optimizer."
    )
    dense_parallel: Literal["ddp", "fsdp"] = Field("ddp", description="dense.strategy of an experiment.")
    tensor_parallel: Count = Field(
        1, description="dense.tensor_parallel of an experiment; of its time only what each rank computes is counted."
    )
    dense_gathered: Precision = Field("fp32", description="dense.gathered of an experiment.")
    activation_checkpointing: Literal["none", "layer"] = Field(
        "none", description="dense.activation_checkpointing of an experiment."
    )
    tables: tuple[TableConfig, ...]
    dense: Annotated[TowerDense | DLRMDense | GivenDense, Field(discriminator="kind")] = GivenDense()
    loss: LossInventory = LossInventory()

    @model_validator(mode="after")
    def _one_batch_and_distinct_names(self):
        if (self.rank_batch_size is None) == (self.global_batch_size is None):
            raise ValueError("set one of rank_batch_size and global_batch_size")
        if not self.tables and isinstance(self.dense, GivenDense) and not self.dense.parameters:
            raise ValueError("tables is empty, and so is dense: name a table, or describe the dense part")
        counts = Counter(table.name for table in self.tables)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"tables are named twice: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _interaction_has_one_width(self):
        if isinstance(self.dense, DLRMDense):
            kind, dim = self.dense.table_layout
            others = [table.name for table in self.tables if table.kind == "pooled" and table.dim != dim]
            if kind == "pooled" and others:
                raise ValueError(f"dense.dim={self.dense.dim} is the width of every pooled table, not of {others[0]}")
        return self

    def dense_lies_on(self, ranks: Any) -> Any:
        """Whether the dense part can lie on so many ranks, as DenseConfig.check_ranks has it; ranks may be an array."""
        shared = (
            ranks > 1
            if self.dense_parallel == "fsdp"
            else (self.tensor_parallel == 1) | (ranks == self.tensor_parallel)
        )
        return shared & (ranks % self.tensor_parallel == 0)

    @property
    def interacting_features(self) -> int:
        """F: the categorical features whose vectors DLRM's interaction takes."""
        kind = self.dense.table_layout[0] if isinstance(self.dense, DLRMDense) else "pooled"
        return sum(table.features for table in self.tables if table.kind == kind)

    @overload
    def batch_on(self, ranks: int) -> int: ...
    @overload
    def batch_on(self, ranks: Any) -> Any: ...
    def batch_on(self, ranks: Any) -> Any:
        """B, examples a step on one of `ranks` ranks; ranks may be an array."""
        if self.rank_batch_size is not None:
            return self.rank_batch_size
        assert self.global_batch_size is not None
        return -(-self.global_batch_size // ranks)

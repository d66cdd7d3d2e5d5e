"""What the planner needs to know of a model: its tables, its dense part, its batch. No weights, no data, no torch.

`gr plan` reads one from YAML (configs/scale), from a bare list of tables (JSON, Parquet), or derives one from an
experiment.
"""

from collections import Counter
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from gr.config.section import Section

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
# TorchRec's EmbeddingCollection knows no others (torchrec/distributed/embedding.py).
SEQUENCE_TYPES: tuple[AnyShardingType, ...] = ("data_parallel", "table_wise", "column_wise", "row_wise")
Kernel = Literal["dense", "fused", "fused_uvm", "fused_uvm_caching"]
OptimizerKind = Literal["adam", "partial_rowwise_adam", "rowwise_adagrad", "adagrad", "sgd"]
ROW_MULTIPLE = 4  # fbgemm asserts that a row is a multiple of 4 elements wide
UNIFORM_MISSES = 0.8  # of a cache of the hottest fifth: no other ids miss it more often
# Limits far above any model, below which sums and products of a plan are exact or at least finite.
LARGEST = 2**53
WIDEST = 2**20  # columns of a table
LARGEST_WORLD = 2**20
MOST_IDS = 1e9  # an example reads
LARGEST_TOTAL = 1e30  # FLOPs, bytes or scores of an example
STEEPEST = 64.0  # Zipf exponent: all draws but 1e-19 read the first row
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0, le=LARGEST)]
CountOrNone = Annotated[int, Field(ge=0, le=LARGEST)]
Length = Annotated[float, Field(gt=0.0, le=LARGEST)]
Total = Annotated[float, Field(ge=0.0, le=LARGEST_TOTAL)]
Rank = Annotated[int, Field(ge=0, lt=LARGEST_WORLD)]


def stored_dim(dim: int) -> int:
    """Columns a table of width `dim` takes: the columns past `dim` are zero and stay zero."""
    return -(-dim // ROW_MULTIPLE) * ROW_MULTIPLE


class TableConfig(Section):
    """One embedding table and how it is read."""

    name: Annotated[str, Field(min_length=1)]
    rows: Count = Field(description="E: rows.")
    dim: Annotated[int, Field(gt=0, le=WIDEST, multiple_of=ROW_MULTIPLE)] = Field(description="Columns stored.")
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    kind: Literal["pooled", "sequence"] = Field("pooled", description="EmbeddingBagCollection or EmbeddingCollection.")
    pooling: Literal["sum", "mean"] = Field("sum", description="Of pooled tables.")
    features: Count = Field(1, description="Features that read the table.")
    ids_per_example: Annotated[float, Field(gt=0.0, le=MOST_IDS)] = Field(
        1.0, description="Mean ids an example reads, over all its features."
    )
    ids_per_step: Annotated[float, Field(ge=0.0, le=LARGEST)] = Field(
        0.0, description="Ids a rank reads a step whatever its batch, such as shared negatives; beside the examples'."
    )
    skew: Annotated[float, Field(ge=0.0, le=STEEPEST)] = Field(
        0.0, description="Zipf exponent of the ids; 0 is uniform."
    )
    cacheability: Annotated[float, Field(ge=0.0, le=UNIFORM_MISSES)] | None = Field(
        None,
        description="Share of lookups missed by a cache of the hottest fifth of the rows: 0 caches well, 0.8 is "
        "uniform. Unset: from skew.",
    )
    optimizer: OptimizerKind = "rowwise_adagrad"
    sharding_types: tuple[AnyShardingType, ...] | None = Field(None, description="Allowed; unset: all that exist.")
    kernels: tuple[Kernel, ...] = Field(
        ("fused",), description="Allowed: fused keeps rows in HBM, fused_uvm on the host, fused_uvm_caching both."
    )
    cache_load_factor: Fraction = Field(0.2, description="Share of the rows in HBM under fused_uvm_caching.")
    ranks: tuple[Rank, ...] | None = Field(None, description="Ranks that may hold it; unset: any.")
    min_shards: Count = 1
    max_shards: Count | None = None

    @model_validator(mode="after")
    def _sequence_types_exist(self):
        wrong = sorted(set(self.sharding_types or ()) - set(SEQUENCE_TYPES))
        if self.kind == "sequence" and wrong:
            raise ValueError(f"{', '.join(wrong)} does not exist for sequence tables; use {', '.join(SEQUENCE_TYPES)}")
        if self.pooling == "mean" and self.sharding_types == ("grid_shard",):
            raise ValueError("grid_shard computes wrong means in torchrec 1.8; use pooling=sum or table_row_wise")
        if self.max_shards is not None and self.max_shards < self.min_shards:
            raise ValueError(f"max_shards={self.max_shards} is below min_shards={self.min_shards}")
        return self


def _check_lengths(mean_length: float, max_length: int) -> None:
    if mean_length > max_length:
        raise ValueError(f"mean_length={mean_length:g} is above max_length={max_length}")


class HSTUDense(Section):
    """A stack of HSTU layers over the sequence (arXiv 2402.17152): W_uvqk, W_o and its bias in each."""

    kind: Literal["hstu"] = "hstu"
    layers: Count
    dim: Count = Field(description="D: model width.")
    heads: Count
    qk_dim: Count = Field(description="Query and key width per head.")
    v_dim: Count = Field(description="Value and gate width per head.")
    mean_length: Length = Field(description="Tokens of a mean example.")
    max_length: Count = Field(description="N: tokens of the longest example.")
    concat_ua: bool = Field(False, description="W_o reads [u, a, u*a], three times as wide, instead of u*a.")
    recompute: bool = Field(True, description="Recompute norms and gates in backward, as the paper does: 14 d bytes.")
    other_parameters: CountOrNone = Field(0, description="Beside W_uvqk, W_o and its bias: positions, other biases.")

    @model_validator(mode="after")
    def _mean_is_below_max(self):
        _check_lengths(self.mean_length, self.max_length)
        return self


class TransformerDense(Section):
    """A stack of pre-norm Transformer layers without biases, and a norm at the end (arXiv 2307.09288)."""

    kind: Literal["transformer"] = "transformer"
    layers: Count
    dim: Count = Field(description="D: model width.")
    heads: Count
    kv_heads: Count | None = Field(None, description="Heads of keys and values; unset: heads.")
    ffn_dim: Count = Field(description="Width of the feed-forward's hidden state.")
    gated: bool = Field(True, description="W2 (silu(W1 x) * W3 x); false: W2 f(W1 x).")
    mean_length: Length = Field(description="Tokens of a mean example.")
    max_length: Count = Field(description="N: tokens of the longest example.")
    other_parameters: CountOrNone = Field(0, description="Beside the matrices and norm weights: positions, biases.")

    @model_validator(mode="after")
    def _heads_divide_and_mean_is_below_max(self):
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}")
        _check_lengths(self.mean_length, self.max_length)
        return self


class DLRMDense(Section):
    """Bottom MLP, interaction, top MLP (arXiv 1906.00091; dcn: low-rank cross net as in MLPerf DLRM-v2)."""

    kind: Literal["dlrm"] = "dlrm"
    dense_features: Count = 13
    dim: Count = Field(description="D: width of every pooled embedding.")
    bottom: tuple[Count, ...] = Field(description="Layer widths after the dense features; the last is dim.")
    top: tuple[Count, ...] = Field(description="Layer widths after the interaction; the last is 1.")
    interaction: Literal["dot", "cat", "dcn", "projection"] = "dot"
    self_interaction: bool = Field(False, description="dot: also each vector with itself.")
    dcn_layers: Count = 3
    dcn_rank: Count = 512
    branch1: tuple[Count, ...] = Field((), description="projection: layer widths, the last a multiple of dim.")
    branch2: tuple[Count, ...] = Field((), description="projection: as branch1.")

    @model_validator(mode="after")
    def _bottom_ends_at_dim(self):
        if not self.top or self.bottom[-1:] != (self.dim,):
            raise ValueError(f"bottom={list(self.bottom)} must end with dim={self.dim}, and top must not be empty")
        if self.interaction == "projection" and not (self.branch1 and self.branch2):
            raise ValueError("interaction=projection needs branch1 and branch2, layer widths")
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

    name: str = "model"
    rank_batch_size: Count | None = Field(None, description="B: examples a step on each rank.")
    global_batch_size: Count | None = Field(None, description="Examples a step over all ranks.")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Of the dense part's activations.")
    comm_dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Of embeddings in all-to-all.")
    index_dedup: bool = Field(
        False, description="A rank asks for a row of a sequence table once (TorchRec, CUDA only)."
    )
    dense_efficiency: Fraction = Field(
        0.5,
        description="Of the topology's FLOP/s, which are those of large matrix products, that the dense part reaches; "
        "0.47 in NVIDIA's published HSTU training on H100 (34.5 % of peak).",
    )
    dense_optimizer: Literal["adam", "sgd", "adagrad"] = "adam"
    dense_parallel: Literal["ddp", "fsdp"] = "ddp"
    tables: tuple[TableConfig, ...]
    dense: Annotated[HSTUDense | TransformerDense | DLRMDense | GivenDense, Field(discriminator="kind")] = GivenDense()
    loss: LossInventory = LossInventory()

    @model_validator(mode="after")
    def _one_batch_and_distinct_names(self):
        if (self.rank_batch_size is None) == (self.global_batch_size is None):
            raise ValueError("set one of rank_batch_size and global_batch_size")
        if not self.tables:
            raise ValueError("tables is empty: name one at least")
        counts = Counter(table.name for table in self.tables)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"tables are named twice: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _interaction_has_one_width(self):
        if isinstance(self.dense, DLRMDense):
            others = [table.name for table in self.tables if table.kind == "pooled" and table.dim != self.dense.dim]
            if others:
                raise ValueError(f"dense.dim={self.dense.dim} is the width of every pooled table, not of {others[0]}")
        return self

    def batch_on(self, ranks: int) -> int:
        """B, examples a step on one of `ranks` ranks."""
        if self.rank_batch_size is not None:
            return self.rank_batch_size
        assert self.global_batch_size is not None
        return -(-self.global_batch_size // ranks)

"""The typed tree of an experiment's configuration. Frozen, no unknown keys, no torch.

Every field is a path a user can write in YAML or override on the command line (`model.tower.layers=8`).
"""

import os
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from gr.config.inventory import AnyShardingType
from gr.config.section import PositiveFloat, Probability, Section
from gr.config.stu import STUConfig

METRICS = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")


class StochasticLength(Section):
    """Train on a subsequence of long histories (arXiv 2402.17152, section 3.3 and App. D)."""

    alpha: Annotated[float, Field(gt=1.0, le=2.0)] = Field(
        1.6, description="A history longer than N^(alpha/2) is cut to that length, except at rate N^alpha / length^2."
    )
    selector: Literal["greedy", "random", "weighted"] = Field(
        "weighted",
        description="Which events stay: the newest, any, or any at a rate that falls with age (counted in events where "
        "the data has no timestamps).",
    )


class DataConfig(Section):
    path: str = Field(description="Folder with schema.json and part-*.parquet, as written by `gr prepare`.")
    max_length: PositiveInt = Field(200, description="N: newest events of a user that the model sees, in tokens.")
    train_holdout: NonNegativeInt = Field(
        2, description="Newest events of each user kept out of training: 2 leaves validation and test, 1 only test."
    )
    cut: Literal["newest", "uniform"] = Field(
        "newest",
        description="Where the example of a user ends: at the newest event, or at one drawn for each epoch, so that "
        "each of the user's n events is the newest at rate 1/n (arXiv 2402.17152, section 2.3).",
    )
    stochastic_length: StochasticLength | None = None
    shuffle: bool = Field(True, description="False keeps file order, for one-pass streams.")
    lanes: PositiveInt = Field(8, description="Streams the global batch is dealt from; a multiple of the world size.")
    balance: bool = Field(
        True, description="Deal the examples of a batch to the ranks so that each has as many FLOPs of tower and loss."
    )
    read_threads: PositiveInt = Field(1, description="Threads that decode row groups ahead of their use.")
    prefetch: PositiveInt = Field(4, description="Batches collated ahead of training.")
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="skip counts a bad row and trains on none of it.")


class HSTUConfig(Section):
    """HSTU, research form (arXiv 2402.17152, Eq. 1-3)."""

    kind: Literal["hstu"] = "hstu"
    layers: PositiveInt = 2
    heads: PositiveInt = 1
    qk_dim: PositiveInt = Field(50, description="Query and key width per head.")
    v_dim: PositiveInt = Field(50, description="Value and gate width per head.")
    dropout: Probability = 0.2
    attention: Literal["pointwise", "softmax"] = Field("pointwise", description="softmax is the paper's ablation.")
    divisor: Literal["constant", "max_len", "actual_len"] = Field(
        "constant",
        description="What SiLU attention is divided by: divisor_value, the longest sequence there can be, or the "
        "sequence's own length, in tokens.",
    )
    divisor_value: PositiveFloat | None = Field(
        None,
        description="Used when divisor is constant; unset: the longest sequence + 11, as the published code has it.",
    )
    concat_ua: bool = Field(False, description="Feed [u, a, u*a] to the output projection instead of u*a.")
    position_bias: bool = True
    time_bias: bool = False
    time_buckets: Annotated[int, Field(ge=1, le=255)] = Field(128, description="Buckets of floor(ln(dt)/0.301).")

    @model_validator(mode="after")
    def _softmax_has_no_bias(self):
        if self.attention == "softmax" and (self.position_bias or self.time_bias):
            raise ValueError("attention=softmax takes no relative bias; set position_bias and time_bias to false")
        return self


class SASRecConfig(Section):
    """SASRec (arXiv 1808.09781), the softmax-attention baseline."""

    kind: Literal["sasrec"] = "sasrec"
    layers: PositiveInt = 2
    heads: PositiveInt = 1
    ffn_dim: PositiveInt = 50
    dropout: Probability = 0.2


class ModelConfig(Section):
    dim: PositiveInt = Field(50, description="D: width of item embeddings and of the tower.")
    input_dropout: Probability = 0.2
    tower: Annotated[HSTUConfig | SASRecConfig | STUConfig, Field(discriminator="kind")] = HSTUConfig()

    @model_validator(mode="after")
    def _heads_divide_dim(self):
        if isinstance(self.tower, SASRecConfig) and self.dim % self.tower.heads:
            raise ValueError(f"dim={self.dim} is not divisible by tower.heads={self.tower.heads}")
        return self


class PerPositionNegatives(Section):
    """Uniform negatives of its own for every position (the reference of arXiv 2402.17152)."""

    kind: Literal["per_position"] = "per_position"
    count: PositiveInt = 128


class SharedNegatives(Section):
    """One uniform draw of negatives shared by all positions of the global batch."""

    kind: Literal["shared"] = "shared"
    count: PositiveInt = 1024


class InBatchNegatives(Section):
    """The other targets of the global batch, corrected by log Q from item frequency (Yi et al., RecSys 2019)."""

    kind: Literal["in_batch"] = "in_batch"


class FullSoftmax(Section):
    """Every item of the corpus: for small catalogues."""

    kind: Literal["full"] = "full"


class TaskConfig(Section):
    kind: Literal["retrieval"] = "retrieval"
    negatives: Annotated[
        PerPositionNegatives | SharedNegatives | InBatchNegatives | FullSoftmax, Field(discriminator="kind")
    ] = PerPositionNegatives()
    temperature: PositiveFloat = 0.05
    l2_norm: bool = Field(True, description="Cosine similarity; false is a plain dot product.")


class Adam(Section):
    kind: Literal["adam"] = "adam"
    lr: PositiveFloat = 1e-3
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8


class PartialRowWiseAdam(Section):
    """Adam whose second moment is one number a row."""

    kind: Literal["partial_rowwise_adam"] = "partial_rowwise_adam"
    lr: PositiveFloat = 1e-3
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8


class RowWiseAdagrad(Section):
    """Adagrad with one accumulator a row, fused into the backward pass."""

    kind: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: PositiveFloat = 1e-2
    eps: PositiveFloat = 1e-8


class Adagrad(Section):
    kind: Literal["adagrad"] = "adagrad"
    lr: PositiveFloat = 1e-2
    eps: PositiveFloat = 1e-8


class SGD(Section):
    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 1e-1


TableOptimizer = Annotated[
    Adam | PartialRowWiseAdam | RowWiseAdagrad | Adagrad | SGD,
    Field(discriminator="kind"),
]


TableInit = Literal["truncated_normal", "uniform_rows"]


class EmbeddingsConfig(Section):
    dtype: Literal["fp32", "fp16"] = "fp32"
    init: TableInit = Field(
        "truncated_normal",
        description="Keyed on (seed, table, row). uniform_rows is DLRM's: within 1/sqrt(rows) of zero.",
    )
    init_std: PositiveFloat = Field(0.02, description="Of truncated_normal, before it is cut at two deviations.")
    optimizer: TableOptimizer = Adam()


class ScheduleConfig(Section):
    kind: Literal["constant", "linear", "quadratic", "cosine"] = Field(
        "constant",
        description="Shape after warm-up and hold. quadratic: the square of linear, as facebookresearch/dlrm.",
    )
    warmup_steps: NonNegativeInt = 0
    hold_steps: NonNegativeInt = Field(0, description="At the peak rate, between warm-up and the shape.")
    final_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Of the peak rate, reached after the last step."
    )


class DenseOptimizer(Section):
    """What every optimizer of the dense parameters has; the schedule also scales the tables' learning rate."""

    kind: str
    lr: PositiveFloat = 1e-3
    clip_grad_norm: PositiveFloat | None = Field(None, description="Global norm of the dense gradients.")
    schedule: ScheduleConfig = ScheduleConfig()


class DenseAdamW(DenseOptimizer):
    kind: Literal["adamw"] = "adamw"
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class DenseAdagrad(DenseOptimizer):
    """As facebookresearch/dlrm takes for dense parameters under adagrad and under rwsadagrad."""

    kind: Literal["adagrad"] = "adagrad"
    eps: PositiveFloat = 1e-8


class DenseSGD(DenseOptimizer):
    kind: Literal["sgd"] = "sgd"


OptimizerConfig = Annotated[DenseAdamW | DenseAdagrad | DenseSGD, Field(discriminator="kind")]


class PlannerConfig(Section):
    name: Literal["gr", "torchrec"] = Field("gr", description="Whose planner; torchrec's is there to compare with.")
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

    @model_validator(mode="after")
    def _torchrec_reads_neither(self):
        if self.name == "torchrec" and (self.plan or self.topology):
            raise ValueError("name=torchrec reads no plan and no topology; unset them, or set name to gr")
        return self


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
    steps: PositiveInt
    global_batch_size: PositiveInt = Field(128, description="Examples a step, over all ranks.")
    log_every: PositiveInt = Field(20, description="Steps between lines of metrics.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs the tower under autocast.")
    operators: Literal["auto", "native", "triton", "torch", "fbgemm"] = Field(
        "auto",
        description="Which implementation of gr.ops runs: C++ on CPU where it can be built, Triton on CUDA (auto); "
        "one of them, or an error; plain PyTorch; or Triton with FBGEMM's CUTLASS kernels for HSTU attention.",
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


class UserEvaluationConfig(Section):
    path: str | None = Field(None, description="Data folder to evaluate on; unset means data.path.")
    every: PositiveInt | None = Field(None, description="Steps between evaluations on the validation split.")
    global_batch_size: PositiveInt = 512


class EvaluationConfig(UserEvaluationConfig):
    filter_seen: Literal["window", "all", "none"] = Field(
        "all",
        description="Items never recommended: those in the model's window, in the user's whole history, or none.",
    )
    select_by: Literal[METRICS] = Field("ndcg@10", description="Validation metric that picks the best checkpoint.")
    baselines: tuple[Literal["popularity", "item_knn", "markov"], ...] = ("popularity", "item_knn", "markov")


class RunConfig(Section):
    """What every kind of experiment has."""

    run_dir: str = Field(description="Folder of this run: config, logs, metrics, checkpoints.")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    optimizer: OptimizerConfig = DenseAdamW()
    planner: PlannerConfig = PlannerConfig()
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()


class HistoryRunConfig(RunConfig):
    """What every experiment on user histories has."""

    data: DataConfig
    evaluation: UserEvaluationConfig = UserEvaluationConfig()

    @model_validator(mode="after")
    def _lanes_divide_batch(self):
        if self.trainer.global_batch_size % self.data.lanes:
            raise ValueError(
                f"trainer.global_batch_size={self.trainer.global_batch_size} is not divisible by "
                f"data.lanes={self.data.lanes}"
            )
        return self

    @property
    def evaluates_training_users(self) -> bool:
        """Whether evaluation reads the users that training reads, so that their targets must be held out."""
        path = self.evaluation.path
        return path is None or os.path.realpath(path) == os.path.realpath(self.data.path)


class ExperimentConfig(HistoryRunConfig):
    """Generative retrieval from user histories."""

    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _targets_are_held_out(self):
        needed = 2 if self.evaluation.every else 1
        if self.evaluates_training_users and self.data.train_holdout < needed:
            raise ValueError(
                f"data.train_holdout={self.data.train_holdout} trains on what is evaluated: set it to {needed}"
                + (", or unset evaluation.every (validation)" if needed == 2 else "")
                + ", or evaluate on other users with evaluation.path"
            )
        return self

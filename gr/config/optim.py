"""Optimizers of the tables and of the dense parameters, and the learning-rate schedule. No torch.

Each states the tensors it keeps, so that building it, saving it and planning for it read one description.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from gr.config.base import PositiveFloat, Probability, Registry, Section

Betas = Annotated[
    tuple[Probability, Probability], Field(description="Decay of the first and of the second moment at each step.")
]
Epsilon = Annotated[PositiveFloat, Field(description="Added to the denominator of the update.")]
TableRate = Annotated[
    PositiveFloat, Field(description="Learning rate of the tables at its peak; optimizer.schedule scales it too.")
]
DenseRate = Annotated[PositiveFloat, Field(description="Learning rate of the dense parameters at its peak.")]
StateShape = Literal["element", "row"]
StateHome = Literal["device", "host"]
StateDtype = Literal["fp32", "bf16"]
DenseStateShape = Literal["parameter", "scalar"]


class TableOptimizerConfig(Section):
    """An optimizer of the tables.

    states: fbgemm's names of the tensors it keeps, each one number an element of the table or one a row.
    fused_type: fbgemm's EmbOptimType. fused_on_cpu: whether fbgemm fuses it into backward there too. Every kernel
    updates the rows that a step looks up and no others.
    """

    kind: str
    lr: TableRate
    state: StateHome = Field(
        "device",
        description="Home of the states that have a number for each element. host: in host memory, through UVM, where "
        "the rows of a step cross the host link; states of a row stay. On CUDA only.",
    )
    state_dtype: StateDtype = Field("fp32", description="Of the states that have a number for each element.")
    states: ClassVar[dict[str, StateShape]] = {}
    fused_type: ClassVar[str]
    fused_on_cpu: ClassVar[bool] = False

    def fused_arguments(self) -> dict[str, Any]:
        """The arguments of fbgemm's update in backward, beside the learning rate."""
        return {}

    @model_validator(mode="after")
    def _states_are_offered(self):
        if fault := self.state_fault(self.kind, self.state, self.state_dtype):
            raise ValueError(fault)
        return self

    @classmethod
    def state_fault(cls, kind: str, state: StateHome, state_dtype: StateDtype) -> str | None:
        """Why fbgemm does not keep the states of this optimizer so, or None. kind: its name."""
        if (state, state_dtype) == ("device", "fp32"):
            return None
        if not cls.states_a("element"):
            return f"state={state}, state_dtype={state_dtype} are of states for each element, and {kind} has none"
        if state_dtype == "bf16" and cls.fused_type != "PARTIAL_ROWWISE_ADAM":
            return f"state_dtype=bf16 of {kind}: fbgemm has it for rowwise_adamw and partial_rowwise_adam only"
        return None

    @classmethod
    def states_a(cls, shape: StateShape) -> int:
        """States with one number for each element, or each row, of a table."""
        return sum(1 for each in cls.states.values() if each == shape)


class _Adam(TableOptimizerConfig):
    lr: TableRate = 1e-3
    betas: Betas = (0.9, 0.98)
    eps: Epsilon = 1e-8

    def fused_arguments(self) -> dict[str, Any]:
        return {"eps": self.eps, "beta1": self.betas[0], "beta2": self.betas[1]}


class Adam(_Adam):
    """Adam (arXiv 1412.6980) of the rows that a step looks up; the others stay, moments included."""

    kind: Literal["adam"] = "adam"
    states: ClassVar[dict[str, StateShape]] = {"exp_avg": "element", "exp_avg_sq": "element"}
    fused_type: ClassVar[str] = "ADAM"


class PartialRowWiseAdam(_Adam):
    """Adam whose second moment is one number a row."""

    kind: Literal["partial_rowwise_adam"] = "partial_rowwise_adam"
    states: ClassVar[dict[str, StateShape]] = {"exp_avg": "element", "exp_avg_sq": "row"}
    fused_type: ClassVar[str] = "PARTIAL_ROWWISE_ADAM"


class RowWiseAdamW(_Adam):
    """partial_rowwise_adam with decoupled weight decay of the rows that a step looks up."""

    kind: Literal["rowwise_adamw"] = "rowwise_adamw"
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Of a looked-up row, times the learning rate, decoupled from the gradient (arXiv 1711.05101)."
    )
    states: ClassVar[dict[str, StateShape]] = {"exp_avg": "element", "exp_avg_sq": "row"}
    fused_type: ClassVar[str] = "PARTIAL_ROWWISE_ADAM"

    def fused_arguments(self) -> dict[str, Any]:
        return super().fused_arguments() | {"weight_decay": self.weight_decay}


class _Adagrad(TableOptimizerConfig):
    lr: TableRate = 1e-2
    eps: Epsilon = 1e-8
    fused_on_cpu: ClassVar[bool] = True

    def fused_arguments(self) -> dict[str, Any]:
        return {"eps": self.eps}


class RowWiseAdagrad(_Adagrad):
    """Adagrad with one accumulator a row, fused into the backward pass."""

    kind: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    states: ClassVar[dict[str, StateShape]] = {"sum": "row"}
    fused_type: ClassVar[str] = "EXACT_ROWWISE_ADAGRAD"


class Adagrad(_Adagrad):
    """Adagrad (Duchi et al., 2011) with one accumulator an element, fused into the backward pass."""

    kind: Literal["adagrad"] = "adagrad"
    states: ClassVar[dict[str, StateShape]] = {"sum": "element"}
    fused_type: ClassVar[str] = "EXACT_ADAGRAD"


class SGD(TableOptimizerConfig):
    """Stochastic gradient descent without momentum, fused into the backward pass."""

    kind: Literal["sgd"] = "sgd"
    lr: TableRate = 1e-1
    fused_type: ClassVar[str] = "EXACT_SGD"
    fused_on_cpu: ClassVar[bool] = True


# kind -> its config and the rule by which it updates the rows that no fused kernel does.
TABLE_OPTIMIZERS = Registry("table optimizer")
TABLE_OPTIMIZERS.add(Adam, "gr.ops.row_update.reference:adam")
TABLE_OPTIMIZERS.add(PartialRowWiseAdam, "gr.ops.row_update.reference:rowwise_adamw")
TABLE_OPTIMIZERS.add(RowWiseAdamW, "gr.ops.row_update.reference:rowwise_adamw")
TABLE_OPTIMIZERS.add(RowWiseAdagrad, "gr.ops.row_update.reference:rowwise_adagrad")
TABLE_OPTIMIZERS.add(Adagrad, "gr.ops.row_update.reference:adagrad")
TABLE_OPTIMIZERS.add(SGD, "gr.ops.row_update.reference:sgd")


class ScheduleConfig(Section):
    """The learning rate by step: linear warm-up, the peak, then a shape that ends at the last step."""

    kind: Literal["constant", "linear", "quadratic", "cosine"] = Field(
        "constant",
        description="Shape after warm-up and hold. quadratic: the square of linear, as facebookresearch/dlrm.",
    )
    warmup_steps: NonNegativeInt = Field(0, description="Steps in which the rate rises linearly to its peak.")
    hold_steps: NonNegativeInt = Field(0, description="At the peak rate, between warm-up and the shape.")
    final_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Of the peak rate, reached after the last step."
    )


class DenseOptimizerConfig(Section):
    """An optimizer of the dense parameters; its schedule also scales the tables' learning rate.

    states: the optimizer's names of the tensors it keeps for a parameter, each of the parameter's shape or a scalar.
    """

    kind: str
    lr: DenseRate = 1e-3
    clip_grad_norm: PositiveFloat | None = Field(
        None, description="Largest global norm of the dense gradients, which are scaled down to it; unset: not clipped."
    )
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate by step, of the tables too.")
    states: ClassVar[dict[str, DenseStateShape]] = {}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer's class, beside lr."""
        return {}

    @classmethod
    def states_a_parameter(cls) -> int:
        """Numbers kept for each element of the parameters."""
        return sum(1 for shape in cls.states.values() if shape == "parameter")


class DenseAdamW(DenseOptimizerConfig):
    """AdamW (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.98)
    eps: Epsilon = 1e-8
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Decoupled from the gradient (arXiv 1711.05101), times the learning rate; all parameters."
    )
    states: ClassVar[dict[str, DenseStateShape]] = {"step": "scalar", "exp_avg": "parameter", "exp_avg_sq": "parameter"}

    def arguments(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay, "fused": True}


class DenseAdagrad(DenseOptimizerConfig):
    """Adagrad, which facebookresearch/dlrm takes for dense parameters under adagrad and under rwsadagrad."""

    kind: Literal["adagrad"] = "adagrad"
    eps: Epsilon = 1e-8
    states: ClassVar[dict[str, DenseStateShape]] = {"step": "scalar", "sum": "parameter"}

    def arguments(self) -> dict[str, Any]:
        return {"eps": self.eps}


class DenseSGD(DenseOptimizerConfig):
    """Stochastic gradient descent without momentum."""

    kind: Literal["sgd"] = "sgd"


# kind -> its config and the torch.optim.Optimizer that it configures.
DENSE_OPTIMIZERS = Registry("dense optimizer")
DENSE_OPTIMIZERS.add(DenseAdamW, "torch.optim:AdamW")
DENSE_OPTIMIZERS.add(DenseAdagrad, "torch.optim:Adagrad")
DENSE_OPTIMIZERS.add(DenseSGD, "torch.optim:SGD")

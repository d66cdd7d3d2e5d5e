"""The optimizer of the embedding tables: fused into backward where fbgemm can, stepped here where it cannot.

On CPU fbgemm has no fused Adam, and data-parallel tables never are fused: their kernels leave a dense gradient, which
`TableOptimizer.step` applies with the same formulas. The one difference: it updates every row at every step, where a
fused Adam leaves the rows alone that were not looked up.
"""

from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from gr.config.tree import Adam, PartialRowWiseAdam, RowWiseAdagrad
from gr.config.tree import TableOptimizer as TableOptimizerConfig
from gr.embeddings.shards import TableShard, local_shards
from gr.embeddings.state import TableEntry, table_entries

FUSED_TYPE = {
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}
FUSED_ON_CPU = {"rowwise_adagrad", "adagrad", "sgd"}


def compute_kernel(config: TableOptimizerConfig, device: torch.device, sharding_type: str) -> str:
    """The TorchRec compute kernel that runs this optimizer on this device."""
    fused = sharding_type != "data_parallel" and (device.type == "cuda" or config.kind in FUSED_ON_CPU)
    return (EmbeddingComputeKernel.FUSED if fused else EmbeddingComputeKernel.DENSE).value


def fused_params(config: TableOptimizerConfig) -> dict[str, Any]:
    """What TorchRec hands to fbgemm for the optimizer in backward."""
    params: dict[str, Any] = {"optimizer": FUSED_TYPE[config.kind], "learning_rate": config.lr}
    if config.kind != "sgd":
        params["eps"] = config.eps
    if isinstance(config, Adam | PartialRowWiseAdam):
        params["beta1"], params["beta2"] = config.betas
    return params


class TableOptimizer:
    """Steps the tables of a sharded model, and owns their optimizer state for checkpoints.

    states[i] holds the state tensors of shards[i] by fbgemm's names: sum (Adagrad), exp_avg and exp_avg_sq (Adam).
    """

    def __init__(self, model: nn.Module, config: TableOptimizerConfig) -> None:
        self.config = config
        self.lr = config.lr
        self.steps = 0
        self.shards: list[TableShard] = list(local_shards(model))
        self.states = [s.states if s.is_fused else _dense_states(s.weight, config) for s in self.shards]

    def set_learning_rate(self, lr: float) -> None:
        """Takes effect at the next backward for fused tables, at the next step for the others."""
        self.lr = lr
        for shard in self.shards:
            if shard.is_fused:
                shard.kernel.emb_module.set_learning_rate(lr)

    def set_steps(self, steps: int) -> None:
        """Steps taken so far, for Adam's bias correction; called after a checkpoint was loaded."""
        self.steps = steps
        for shard in self.shards:
            if shard.is_fused:
                shard.kernel.emb_module.set_optimizer_step(steps)

    def entries(self) -> list[TableEntry]:
        """Weights and states as a checkpoint keeps them."""
        return table_entries(self.shards, self.states)

    @torch.no_grad()
    def step(self) -> None:
        """Applies and clears the gradients that dense kernels were left with."""
        self.steps += 1
        for shard, states in zip(self.shards, self.states, strict=True):
            if not shard.is_fused and (gradient := shard.gradient()) is not None:
                # In float32: eps and the squares of small gradients are zero in float16.
                weight = shard.weight.float()
                self._update(weight, gradient.float(), states)
                shard.weight.copy_(weight)
        # Only now: the shards of one kernel share one gradient tensor.
        for shard in self.shards:
            if not shard.is_fused:
                shard.kernel.emb_module.weights.grad = None

    def _update(self, weight: Tensor, gradient: Tensor, states: dict[str, Tensor]) -> None:
        config = self.config
        if config.kind == "sgd":
            weight.sub_(gradient, alpha=self.lr)
            return
        if isinstance(config, Adam | PartialRowWiseAdam):
            beta1, beta2 = config.betas
            mean = states["exp_avg"].lerp_(gradient, 1 - beta1)
            if isinstance(config, Adam):
                square = states["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            else:
                square = states["exp_avg_sq"].lerp_(gradient.square().mean(1), 1 - beta2).unsqueeze(1)
            root = (square / (1 - beta2**self.steps)).sqrt_().add_(config.eps)
            weight.addcdiv_(mean, root, value=-self.lr / (1 - beta1**self.steps))
            return
        if isinstance(config, RowWiseAdagrad):
            total = states["sum"].add_(gradient.square().mean(1)).unsqueeze(1)
        else:
            total = states["sum"].addcmul_(gradient, gradient)
        weight.addcdiv_(gradient, total.sqrt().add_(config.eps), value=-self.lr)


def _dense_states(weight: Tensor, config: TableOptimizerConfig) -> dict[str, Tensor]:
    full = torch.zeros_like(weight, dtype=torch.float32)
    row = full.new_zeros(weight.shape[0])
    match config.kind:
        case "adam":
            return {"exp_avg": full, "exp_avg_sq": full.clone()}
        case "partial_rowwise_adam":
            return {"exp_avg": full, "exp_avg_sq": row}
        case "rowwise_adagrad":
            return {"sum": row}
        case "adagrad":
            return {"sum": full}
        case _:
            return {}

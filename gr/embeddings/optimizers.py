"""The optimizers of the embedding tables: fused into backward where fbgemm can, stepped here where it cannot.

On CPU fbgemm has no fused Adam, and data-parallel tables never are fused: their kernels leave a dense gradient, which
`TableOptimizer.step` applies with the same formulas. The one difference: it updates every row at every step, where a
fused Adam leaves the rows alone that were not looked up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn

from gr.config.optim import (
    SGD,
    TABLE_OPTIMIZERS,
    Adagrad,
    Adam,
    PartialRowWiseAdam,
    RowWiseAdagrad,
    TableOptimizerConfig,
)
from gr.config.run import EmbeddingsConfig
from gr.embeddings.local_shards import TableShard, local_shards
from gr.embeddings.state import TableEntry, table_entries


def fused_params(config: TableOptimizerConfig) -> dict[str, Any]:
    """The parameters that TorchRec hands to fbgemm for the update in backward."""
    optimizer = EmbOptimType[config.fused_type]
    return {"optimizer": optimizer, "learning_rate": config.lr, **config.fused_arguments()}


class TableOptimizer:
    """Steps the tables of a sharded model, each by its optimizer, and owns their state for checkpoints.

    configs[i]: the optimizer of shards[i]. states[i] holds the state tensors of shards[i] by fbgemm's names: sum
    (Adagrad), exp_avg and exp_avg_sq (Adam).
    """

    def __init__(self, model: nn.Module, embeddings: EmbeddingsConfig) -> None:
        self.factor = 1.0
        self.steps = 0
        self.shards: list[TableShard] = list(local_shards(model))
        self.configs = [embeddings.optimizer_of(shard.table) for shard in self.shards]
        self.states = [
            shard.states if shard.is_fused else _dense_states(shard.weight, config)
            for shard, config in zip(self.shards, self.configs, strict=True)
        ]

    def scale_learning_rates(self, factor: float) -> None:
        """Each is `factor` of its configured value: from the next backward for fused tables, the next step for others.

        The shards of one kernel have one optimizer: TorchRec groups tables by it.
        """
        self.factor = factor
        for shard, config in zip(self.shards, self.configs, strict=True):
            if shard.is_fused:
                shard.kernel.emb_module.set_learning_rate(config.lr * factor)

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
        for shard, config, states in zip(self.shards, self.configs, self.states, strict=True):
            if not shard.is_fused and (gradient := shard.gradient()) is not None:
                # In float32: eps and the squares of small gradients are zero in float16.
                weight, update = shard.weight.float(), TABLE_OPTIMIZERS.target(config)
                update(config, weight, gradient.float(), states, lr=config.lr * self.factor, steps=self.steps)
                shard.weight.copy_(weight)
        # Only now: the shards of one kernel share one gradient tensor.
        for shard in self.shards:
            if not shard.is_fused:
                shard.kernel.emb_module.weights.grad = None


def _dense_states(weight: Tensor, config: TableOptimizerConfig) -> dict[str, Tensor]:
    """The states of a dense kernel's shard, zero: float32 [r, c], or [r] where a row has one number."""
    return {
        name: torch.zeros(weight.shape if shape == "element" else weight.shape[:1], device=weight.device)
        for name, shape in config.states.items()
    }


# The updates of fbgemm's fused optimizers, in place on whole shards: weight and gradient float32 [r, c]; states as in
# _dense_states; steps: taken so far, with this one.


def sgd_update(
    config: SGD, weight: Tensor, gradient: Tensor, states: Mapping[str, Tensor], *, lr: float, steps: int
) -> None:
    weight.sub_(gradient, alpha=lr)


def adam_update(
    config: Adam, weight: Tensor, gradient: Tensor, states: Mapping[str, Tensor], *, lr: float, steps: int
) -> None:
    beta1, beta2 = config.betas
    mean = states["exp_avg"].lerp_(gradient, 1 - beta1)
    square = states["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square / (1 - beta2**steps)).sqrt_().add_(config.eps)
    weight.addcdiv_(mean, root, value=-lr / (1 - beta1**steps))


def partial_rowwise_adam_update(
    config: PartialRowWiseAdam, weight: Tensor, gradient: Tensor, states: Mapping[str, Tensor], *, lr: float, steps: int
) -> None:
    beta1, beta2 = config.betas
    mean = states["exp_avg"].lerp_(gradient, 1 - beta1)
    square = states["exp_avg_sq"].lerp_(gradient.square().mean(1), 1 - beta2).unsqueeze(1)
    root = (square / (1 - beta2**steps)).sqrt_().add_(config.eps)
    weight.addcdiv_(mean, root, value=-lr / (1 - beta1**steps))


def rowwise_adagrad_update(
    config: RowWiseAdagrad, weight: Tensor, gradient: Tensor, states: Mapping[str, Tensor], *, lr: float, steps: int
) -> None:
    total = states["sum"].add_(gradient.square().mean(1)).unsqueeze(1)
    weight.addcdiv_(gradient, total.sqrt().add_(config.eps), value=-lr)


def adagrad_update(
    config: Adagrad, weight: Tensor, gradient: Tensor, states: Mapping[str, Tensor], *, lr: float, steps: int
) -> None:
    total = states["sum"].addcmul_(gradient, gradient)
    weight.addcdiv_(gradient, total.sqrt().add_(config.eps), value=-lr)

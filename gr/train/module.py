"""What one training step is: forward, backward and update of a sharded model."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from gr.config.tree import DenseAdagrad, DenseAdamW, DenseSGD, OptimizerConfig, RunConfig
from gr.dist import World
from gr.embeddings import StagedLookup, TableOptimizer
from gr.train.balance import Balance
from gr.train.objectives import Inputs, Objective
from gr.train.schedule import rate_factor


@dataclass(frozen=True)
class StepLoss:
    """loss: the scalar to run backward on. total: sum of this rank's losses, nats, without a gradient.

    tokens: losses that were summed, over all ranks (tokens of sequences, or examples). examples: of all ranks.
    """

    loss: Tensor
    total: Tensor
    tokens: int
    examples: int


@dataclass(frozen=True)
class Prepared:
    """A batch of this rank, on its device, and all that its step needs to know of the other ranks' batches.

    tokens, examples: losses and examples of all ranks.
    """

    step: int
    inputs: Inputs
    lookup: StagedLookup
    tokens: int
    examples: int


class TrainModule:
    """A sharded model with its optimizers. The trainer sees prepare(), forward(), backward() and the state to save."""

    def __init__(
        self,
        model: DistributedModelParallel,
        objective: Objective,
        config: RunConfig,
        world: World,
        balance: Balance | None = None,
    ) -> None:
        """balance: deals examples to the ranks; None: each keeps those of its loader."""
        self.model, self.objective, self.config, self.world = model, objective, config, world
        self.balance = balance
        self.tables = get_unwrapped_module(model).tables
        self.dense = dense_parameters(model)
        self.dense_optimizer = dense_optimizer(self.dense.values(), config.optimizer)
        self.table_optimizer = TableOptimizer(model, config.embeddings.optimizer)

    def prepare(self, batch, step: int) -> Prepared:
        """Every rank must call it, in the order of steps. Reads no parameter, so it may be done steps ahead."""
        if self.balance is not None:
            batch = self.balance(batch)
        counts = self.world.all_gather_ints([self.objective.losses(batch), self.objective.examples(batch)])
        tokens, examples = zip(*counts, strict=True)
        before = sum(tokens[: self.world.rank])
        inputs = self.objective.inputs(batch, step, before, self.world.device)
        return Prepared(step, inputs, StagedLookup(self.tables, inputs.lookups), sum(tokens), sum(examples))

    def forward(self, prepared: Prepared) -> StepLoss:
        """Loss of one global batch. Draws are a function of (seed, step, rank), so a resumed run repeats them.

        A GPU is not waited for.
        """
        self.model.train()
        found = prepared.lookup.rows()
        torch.manual_seed(_step_seed(self.config.seed, prepared.step, self.world.rank))
        total = self.objective.total(self.model, prepared.inputs, found)
        # DDP and TorchRec average gradients over ranks; this makes the average the mean over all tokens.
        loss = total * (self.world.size / max(1, prepared.tokens))
        return StepLoss(loss, total.detach(), prepared.tokens, prepared.examples)

    def backward(self, loss: StepLoss, step: int) -> None:
        """Gradients and updates; fused tables are updated inside backward, so rates are set first."""
        factor = rate_factor(self.config.optimizer.schedule, step, self.config.trainer.steps)
        self.table_optimizer.set_learning_rate(self.config.embeddings.optimizer.lr * factor)
        for group in self.dense_optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor
        loss.loss.backward()
        if self.config.optimizer.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.dense.values(), self.config.optimizer.clip_grad_norm)
        self.dense_optimizer.step()
        self.dense_optimizer.zero_grad()
        self.table_optimizer.step()

    @property
    def learning_rate(self) -> float:
        return self.dense_optimizer.param_groups[0]["lr"]


def dense_parameters(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """Parameters by name, without the tables."""
    inner = get_unwrapped_module(model)
    return {name: p for name, p in inner.named_parameters() if not name.startswith("tables.")}


def dense_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's optimizer of that kind."""
    match config:
        case DenseAdamW():
            return torch.optim.AdamW(
                parameters,
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case DenseAdagrad():
            return torch.optim.Adagrad(parameters, lr=config.lr, eps=config.eps)
        case DenseSGD():
            return torch.optim.SGD(parameters, lr=config.lr)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Distinct for every (seed, step, rank) that a run can reach."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + rank * 0x2545F4914F6CDD1D) % (1 << 63)

"""One training step: forward, backward and update of a sharded model, and the objective that it minimises."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from gr.config.optim import DENSE_OPTIMIZERS, DenseOptimizerConfig
from gr.config.run import RunConfig
from gr.dist import World
from gr.embeddings import HandedOver, PipelinedLookup, TableOptimizer
from gr.parallel.dense import by_mesh, clip_gradients, dense_parameters, unwrapped
from gr.parallel.groups import TableCopies, copies_of
from gr.training.phases import Phases
from gr.training.schedule import rate_factor


@dataclass(frozen=True)
class Inputs:
    """The inputs of a forward pass, on its device. lookups: the ids to look up in the tables, None without tables.

    candidates: of a step of retrieval.
    """

    batch: Any
    lookups: KeyedJaggedTensor | None = None
    candidates: Any = None

    def record_stream(self, stream: torch.Stream) -> None:
        """Tensor.record_stream of every tensor."""
        for part in (self.batch, self.lookups, self.candidates):
            if part is not None:
                part.record_stream(stream)


class Objective(Protocol):
    """The losses that the steps of one recipe minimise. The train module averages over those of all ranks."""

    def losses(self, batch) -> int:
        """The number of losses of this rank's batch."""

    def examples(self, batch) -> int:
        """The number of examples of this rank's batch."""

    def inputs(self, batch, step: int, first: int, device: torch.device) -> Inputs:
        """The inputs of a step, from a batch on the CPU.

        first: losses on the ranks before this one, for draws by position, where the batch does not number them itself.
        """

    def total(self, model: nn.Module, inputs: Inputs, looked_up: Any) -> Tensor:
        """Sum of the losses, a scalar in nats. looked_up: what the tables have for inputs.lookups."""


class ScoringObjective(Objective, Protocol):
    """Keeps what the last batch was scored, before it was trained on: arguments of its metrics' update()."""

    scored: tuple[Tensor, ...] | None


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

    tokens, examples: the numbers of losses and of examples over all ranks. flops: of the dense part, forward and
    backward, over all ranks; 0 where it is not known. handed_over: rows that the step gives to other ids.
    """

    step: int
    inputs: Inputs
    lookup: PipelinedLookup | None
    tokens: int
    examples: int
    flops: int = 0
    handed_over: Sequence[HandedOver] = ()


class TrainModule:
    """A sharded model with its optimizers. The trainer sees prepare(), forward(), backward() and the state to save."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: RunConfig,
        world: World,
        balance: Callable[[Any], Any] | None = None,
        *,
        steps: int | None = None,
        flops: Callable[[Any], float] | None = None,
    ) -> None:
        """balance: deals the examples of a batch to the ranks; None: each keeps those of its loader. steps: of the run,
        at the last of which the learning rate's schedule ends; None: trainer.steps. flops: of the dense part on a batch
        of this rank, forward and backward; None: not known.
        """
        self.model, self.objective, self.config, self.world = model, objective, config, world
        self.balance = balance
        self.steps, self.flops = steps or config.trainer.steps or 0, flops
        self.phases = Phases(world.device, enabled=world.is_main)
        self.gradient_norm: Tensor | None = None  # of the dense part, before clipping, at the last step that logs it
        self.tables = getattr(unwrapped(model), "tables", None)
        self.dense = dense_parameters(model)
        self.dense_groups = by_mesh(self.dense.values())
        self.dense_optimizer = build_optimizer((p for p in self.dense.values() if p.requires_grad), config.optimizer)
        self.table_optimizer = TableOptimizer(model, config.embeddings, config.seed)
        self.ids = self.table_optimizer.ids
        copies = copies_of(model)
        interval = config.planner.sync_interval
        self.copies = None if copies is None else TableCopies(self.table_optimizer, copies, interval)

    def prepare(self, batch, step: int) -> Prepared:
        """Every rank must call it, in the order of steps. Reads no parameter, so it may be done steps ahead, but for
        raw ids, whose map it changes.
        """
        if self.balance is not None:
            batch = self.balance(batch)
        flops = 0 if self.flops is None else int(self.flops(batch))
        counts = self.world.all_gather_ints([self.objective.losses(batch), self.objective.examples(batch), flops])
        tokens, examples, all_flops = zip(*counts, strict=True)
        before = sum(tokens[: self.world.rank])
        inputs = self.objective.inputs(batch, step, before, self.world.device)
        lookups = inputs.lookups
        handed_over: Sequence[HandedOver] = ()
        if lookups is not None and self.ids is not None:
            lookups, handed_over = self.ids.train(lookups, step)
        lookup = None if lookups is None else PipelinedLookup(self.tables, lookups)
        return Prepared(step, inputs, lookup, sum(tokens), sum(examples), sum(all_flops), handed_over)

    def forward(self, prepared: Prepared) -> StepLoss:
        """Loss of one global batch. Draws are a function of (seed, step, rank), so a resumed run repeats them.

        A GPU is not waited for.
        """
        if not self.model.training:  # hundreds of modules are gone through
            self.model.train()
        # A fused update takes its rate along at the lookup, though it runs in backward.
        self.table_optimizer.scale_learning_rates(self._rate_factor(prepared.step))
        self.phases.start()
        self.table_optimizer.hand_over(prepared.handed_over)
        looked_up = None if prepared.lookup is None else prepared.lookup.rows()
        self._seed(_step_seed(self.config.seed, prepared.step, self.world.rank))
        total = self.objective.total(self.model, prepared.inputs, looked_up)
        # DDP and TorchRec average gradients over ranks; this makes the average the mean over all tokens.
        loss = total * (self.world.size / max(1, prepared.tokens))
        self.phases.end("forward")
        return StepLoss(loss, total.detach(), prepared.tokens, prepared.examples)

    def _seed(self, seed: int) -> None:
        if self.world.device.type == "cpu":
            # torch.manual_seed writes down the call stack for each kind of device that it finds not started.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def backward(self, loss: StepLoss, step: int) -> None:
        """Gradients and updates; fused tables are updated inside backward."""
        for group in self.dense_optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * self._rate_factor(step)
        self.phases.start()
        loss.loss.backward()
        self.phases.end("backward")
        self._clip(step + 1)
        self.dense_optimizer.step()
        self.dense_optimizer.zero_grad()
        self.table_optimizer.step()
        if self.copies is not None:
            self.copies.after_step()
        self.phases.end("optimizer")

    def agree(self) -> None:
        """Averages the tables of the groups of ranks, where there are any. Before what reads them; collective."""
        if self.copies is not None:
            self.copies.agree()

    def _clip(self, step: int) -> None:
        """Clips the dense gradients, and notes their norm where `step`, counted from 1, is one that is logged."""
        limit = self.config.optimizer.clip_grad_norm
        if limit is not None or step % self.config.trainer.log_every == 0 or step == self.steps:
            self.gradient_norm = clip_gradients(self.dense_groups, limit)

    def _rate_factor(self, step: int) -> float:
        return rate_factor(self.config.optimizer.schedule, step, self.steps)

    @property
    def learning_rate(self) -> float:
        return self.dense_optimizer.param_groups[0]["lr"]


def build_optimizer(parameters: Iterable[nn.Parameter], config: DenseOptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` configures; its fused kernels take the parameters of each mesh by themselves."""
    groups = [{"params": group} for group in by_mesh(parameters)]
    return DENSE_OPTIMIZERS.target(config)(groups, lr=config.lr, **config.arguments())


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Distinct for every (seed, step, rank) that a run can reach."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + rank * 0x2545F4914F6CDD1D) % (1 << 63)

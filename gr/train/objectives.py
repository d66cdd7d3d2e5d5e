"""What a step minimises: how many losses a batch has, and their sum."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from gr.batch import HistoryBatch, SequenceBatch, TabularBatch, move_ids
from gr.config.dlrm import RankingLoss
from gr.config.generative import GenerativeTaskConfig
from gr.dist import World
from gr.embeddings import with_candidates
from gr.tasks import Candidates, CandidateSampler
from gr.tasks.multitask import multitask_loss
from gr.tasks.ranking import ranking_loss


@dataclass(frozen=True)
class Inputs:
    """What a forward pass reads, on its device. lookups: the ids that the tables are asked for."""

    batch: Any
    lookups: KeyedJaggedTensor
    candidates: Candidates | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        """As Tensor.record_stream, of all that is in it."""
        self.batch.record_stream(stream)
        self.lookups.record_stream(stream)
        if self.candidates is not None:
            self.candidates.record_stream(stream)


class Objective(Protocol):
    """Of one kind of model and batch. The trainer averages over the losses of all ranks."""

    def losses(self, batch) -> int:
        """Losses of this rank's batch."""

    def examples(self, batch) -> int:
        """Examples of this rank's batch."""

    def inputs(self, batch, step: int, first: int, device: torch.device) -> Inputs:
        """Those of a step, from a batch on the CPU. first: losses on the ranks before this one, for draws by position,
        where the batch does not number them itself.
        """

    def total(self, model: DistributedModelParallel, inputs: Inputs, found: Any) -> Tensor:
        """Sum of the losses, a scalar in nats. found: what the tables have for inputs.lookups."""


class RetrievalObjective:
    """-log p(next item) at every position, against candidates drawn for the step."""

    def __init__(self, sampler: CandidateSampler, world: World) -> None:
        self.sampler, self.world = sampler, world

    def losses(self, batch: SequenceBatch) -> int:
        return len(batch.target_ids_T)

    def examples(self, batch: SequenceBatch) -> int:
        return batch.features.stride()

    def inputs(self, batch: SequenceBatch, step: int, first: int, device: torch.device) -> Inputs:
        candidates = self.sampler.draw(batch, step, self.world, first)
        lookups = move_ids(with_candidates(batch.features, candidates.ids_K), device)
        return Inputs(batch.to(device), lookups, candidates.to(device))

    def total(self, model: DistributedModelParallel, inputs: Inputs, found: Any) -> Tensor:
        return model(inputs.batch, inputs.candidates, found)


class ScoringObjective(Objective, Protocol):
    """Keeps what the last batch was scored, before it was trained on: arguments of its metrics' update()."""

    scored: tuple[Tensor, ...] | None


class RankingObjective:
    """The loss of each example's label. scored: logits, labels."""

    def __init__(self, loss: RankingLoss) -> None:
        self.loss = loss
        self.scored: tuple[Tensor, ...] | None = None

    def losses(self, batch: TabularBatch) -> int:
        return len(batch.labels_B)

    def examples(self, batch: TabularBatch) -> int:
        return len(batch.labels_B)

    def inputs(self, batch: TabularBatch, step: int, first: int, device: torch.device) -> Inputs:
        batch = batch.to(device)
        return Inputs(batch, batch.sparse)

    def total(self, model: DistributedModelParallel, inputs: Inputs, found: Any) -> Tensor:
        batch: TabularBatch = inputs.batch
        logits_B = model(batch.dense_BN, batch.sparse, found)
        self.scored = logits_B.detach(), batch.labels_B
        return ranking_loss(logits_B, batch.labels_B, self.loss).sum()


class GenerativeObjective:
    """The losses of all tasks at each predicted event. scored: outputs, labels, users."""

    def __init__(self, task: GenerativeTaskConfig) -> None:
        self.tasks = task.tasks
        self.scored: tuple[Tensor, ...] | None = None

    def losses(self, batch: HistoryBatch) -> int:
        return batch.scored

    def examples(self, batch: HistoryBatch) -> int:
        return len(batch.user_B)

    def inputs(self, batch: HistoryBatch, step: int, first: int, device: torch.device) -> Inputs:
        batch = batch.to(device)
        return Inputs(batch, batch.features)

    def total(self, model: DistributedModelParallel, inputs: Inputs, found: Any) -> Tensor:
        batch: HistoryBatch = inputs.batch
        outputs_PC = model(batch, found)
        labels_PC, user_P = batch.targets()
        self.scored = outputs_PC.detach(), labels_PC, user_P
        return multitask_loss(outputs_PC, labels_PC, self.tasks).sum()

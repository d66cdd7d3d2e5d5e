"""What a step minimises: how many losses a batch has, and their sum."""

from typing import Protocol

from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from gr.batch import HistoryBatch, SequenceBatch, TabularBatch
from gr.config.dlrm import RankingLoss
from gr.config.generative import GenerativeTaskConfig
from gr.dist import World
from gr.tasks import CandidateSampler
from gr.tasks.multitask import multitask_loss
from gr.tasks.ranking import ranking_loss


class Objective(Protocol):
    """Of one kind of model and batch. The trainer averages over the losses of all ranks."""

    def losses(self, batch) -> int:
        """Losses of this rank's batch."""

    def examples(self, batch) -> int:
        """Examples of this rank's batch."""

    def total(self, model: DistributedModelParallel, batch, step: int, first: int) -> Tensor:
        """Sum of the losses, a scalar in nats. first: losses on the ranks before this one, for draws by position."""


class RetrievalObjective:
    """-log p(next item) at every position, against candidates drawn for the step."""

    def __init__(self, sampler: CandidateSampler, world: World) -> None:
        self.sampler, self.world = sampler, world

    def losses(self, batch: SequenceBatch) -> int:
        return len(batch.target_ids_T)

    def examples(self, batch: SequenceBatch) -> int:
        return batch.features.stride()

    def total(self, model: DistributedModelParallel, batch: SequenceBatch, step: int, first: int) -> Tensor:
        return model(batch, self.sampler.draw(batch, step, self.world, first))


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

    def total(self, model: DistributedModelParallel, batch: TabularBatch, step: int, first: int) -> Tensor:
        logits_B = model(batch.dense_BN, batch.sparse)
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

    def total(self, model: DistributedModelParallel, batch: HistoryBatch, step: int, first: int) -> Tensor:
        outputs_PC = model(batch)
        labels_PC, user_P = batch.targets()
        self.scored = outputs_PC.detach(), labels_PC, user_P
        return multitask_loss(outputs_PC, labels_PC, self.tasks).sum()

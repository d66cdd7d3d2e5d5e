"""A retrieval model beside a frozen reference of itself, to fine-tune it on preferences.

The tables are frozen. They are the largest part of a model, and the reference would need them a second time, with rows
that the ranks exchange; and rows without a pair would stay behind while the tower moves with the others. So both read
the same tables, and the reference is the dense part alone: positions and tower. So are the reward model that scores
lists, and the policy that draws them for some steps.

P positions with a pair, K rejected items of each, or P histories with S candidates; T packed tokens, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec import JaggedTensor

from gr.batch import PreferenceBatch, RetrievalBatch
from gr.config.preference import ListLoss, PPOLoss, PreferenceConfig
from gr.embeddings import sequence_vectors, with_candidates
from gr.models.retrieval import RetrievalModel, Weights
from gr.ops.sampled_logits import sampled_logits
from gr.schema import DataSchema
from gr.tasks import Pairs, Rollout, preference_loss
from gr.tasks.policy import list_log_probability, ppo_loss, rejection_loss
from gr.towers import build_tower


class Reference(nn.Module):
    """The dense part of a retrieval model, never trained."""

    def __init__(self, config: PreferenceConfig) -> None:
        super().__init__()
        dim, max_length = config.model.dim, config.data.max_length
        self.position = nn.Parameter(torch.empty(max_length, dim))
        self.tower = build_tower(config.model.tower, dim=dim, max_length=max_length)
        self.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.position)


class ValueHead(nn.Module):
    """The reward that PPO expects of a list: at first the mean reward of one item that the policy draws."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, expected_P: Tensor) -> Tensor:
        return self.weight * expected_P + self.bias


class PreferenceModel(RetrievalModel):
    """Moves the scores of better liked items above those of others. Build it on meta.

    Dropout is off, also in training: the model is compared with its reference, score by score.
    """

    def __init__(self, config: PreferenceConfig, schema: DataSchema) -> None:
        super().__init__(config, schema)
        self.loss = config.task.loss
        self.reference = Reference(config)
        if isinstance(self.loss, ListLoss):
            self.reward = Reference(config)
        if isinstance(self.loss, PPOLoss):
            self.drawing = Reference(config)
            self.value = ValueHead()

    def train(self, mode: bool = True) -> "PreferenceModel":
        return super().train(False)

    @torch.no_grad()
    def keep(self, copy: Reference) -> None:
        """Makes a frozen copy what the dense part is now. Collective where that is sharded."""
        own = dict(self.named_parameters())
        for name, parameter in copy.named_parameters():
            value = own[name]
            parameter.copy_(value.full_tensor() if isinstance(value, DTensor) else value)

    def forward(  # type: ignore[override]
        self,
        batch: RetrievalBatch,
        compared: Pairs | Rollout,
        looked_up: Mapping[str, JaggedTensor] | None = None,
    ) -> Tensor:
        """Sum of the losses over the P positions, a scalar in nats. looked_up: of pairs.ids_N, as in RetrievalModel; of
        the histories alone for a rollout.
        """
        if isinstance(self.loss, ListLoss):
            assert isinstance(compared, Rollout) and looked_up is not None
            return self._list_losses(batch, compared, looked_up).sum()
        assert isinstance(batch, PreferenceBatch) and isinstance(compared, Pairs)
        scores_P1K, reference_P1K = self.scores(batch, compared, looked_up)
        return preference_loss(scores_P1K, reference_P1K, compared.gap_PK, self.loss).sum()

    def _list_losses(self, batch: RetrievalBatch, rollout: Rollout, looked_up: Mapping[str, JaggedTensor]) -> Tensor:
        queries_PD = self.prompt_queries(batch, rollout.place_P, looked_up, self)
        scores_PS = self.candidate_scores(queries_PD, rollout.items_ND, rollout.item_PS)
        if not isinstance(self.loss, PPOLoss):
            return rejection_loss(scores_PS, rollout.order_PL)
        assert rollout.old_P is not None and rollout.reward_P is not None and rollout.expected_P is not None
        value_P = self.value(rollout.expected_P)
        own_P = list_log_probability(scores_PS, rollout.order_PL)
        clipped_P = ppo_loss(own_P, rollout.old_P, rollout.reward_P - value_P.detach(), self.loss.clip)
        return clipped_P + self.loss.value_weight * (value_P - rollout.reward_P).square() / 2

    def prompt_queries(
        self, batch: RetrievalBatch, place_P: Tensor, looked_up: Mapping[str, JaggedTensor], weights: Weights
    ) -> Tensor:
        """Float [P, D]: what the similarity compares with items, at the tokens place_P, by a dense part."""
        history_TD = sequence_vectors(looked_up, self.dim, self.features)[0].detach()
        return self.similarity.queries(self._run_tower(history_TD, batch, weights)[place_P].float())

    def candidate_scores(self, queries_PD: Tensor, items_ND: Tensor, item_PS: Tensor) -> Tensor:
        """Float [P, S]. items_ND: as the similarity has them. item_PS: int64, rows of items_ND."""
        return sampled_logits(queries_PD, items_ND, item_PS) * self.similarity.scale

    def scores(
        self, batch: PreferenceBatch, pairs: Pairs, looked_up: Mapping[str, JaggedTensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """float [P, 1 + K] twice: of the model and of the reference."""
        if looked_up is None:
            looked_up = self.tables(with_candidates(batch.features, pairs.ids_N, self.item_features))
        items_ND = sequence_vectors(looked_up, self.dim, self.features)[1].detach()
        items_ND = self.similarity.items(items_ND.float())

        def scores_by(weights: Weights) -> Tensor:
            queries_PD = self.prompt_queries(batch, pairs.place_P, looked_up, weights)
            return self.candidate_scores(queries_PD, items_ND, pairs.item_P1K)

        own_P1K = scores_by(self)
        with torch.no_grad():
            return own_P1K, scores_by(self.reference)

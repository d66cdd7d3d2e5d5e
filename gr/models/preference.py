"""A retrieval model beside a frozen reference of itself, to fine-tune it on preferences.

The tables are frozen. They are the largest part of a model, and the reference would need them a second time, with rows
that the ranks exchange; and rows without a pair would stay behind while the tower moves with the others. So both read
the same tables, and the reference is the dense part alone: positions and tower.

P positions with a pair, K rejected items of each; T packed tokens, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec import JaggedTensor

from gr.batch import PreferenceBatch
from gr.config.preference import PreferenceConfig
from gr.embeddings import sequence_vectors, with_candidates
from gr.models.retrieval import RetrievalModel, Weights
from gr.ops.sampled_logits import sampled_logits
from gr.schema import DataSchema
from gr.tasks import Pairs, preference_loss
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


class PreferenceModel(RetrievalModel):
    """Moves the scores of better liked items above those of others. Build it on meta.

    Dropout is off, also in training: the model is compared with its reference, score by score.
    """

    def __init__(self, config: PreferenceConfig, schema: DataSchema) -> None:
        super().__init__(config, schema)
        self.loss = config.task.loss
        self.reference = Reference(config)

    def train(self, mode: bool = True) -> "PreferenceModel":
        return super().train(False)

    @torch.no_grad()
    def keep_reference(self) -> None:
        """Makes the reference what the dense part is now. Collective where that is sharded."""
        own = dict(self.named_parameters())
        for name, parameter in self.reference.named_parameters():
            value = own[name]
            parameter.copy_(value.full_tensor() if isinstance(value, DTensor) else value)

    def forward(  # type: ignore[override]
        self, batch: PreferenceBatch, pairs: Pairs, looked_up: Mapping[str, JaggedTensor] | None = None
    ) -> Tensor:
        """Sum of the losses over the P positions, a scalar in nats. looked_up: of pairs.ids_N, as in RetrievalModel."""
        scores_P1K, reference_P1K = self.scores(batch, pairs, looked_up)
        return preference_loss(scores_P1K, reference_P1K, pairs.gap_PK, self.loss).sum()

    def scores(
        self, batch: PreferenceBatch, pairs: Pairs, looked_up: Mapping[str, JaggedTensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """float [P, 1 + K] twice: of the model and of the reference."""
        if looked_up is None:
            looked_up = self.tables(with_candidates(batch.features, pairs.ids_N, self.item_features))
        history_TD, items_ND = (rows.detach() for rows in sequence_vectors(looked_up, self.dim, self.features))
        items_ND = self.similarity.items(items_ND.float())

        def scores_by(weights: Weights) -> Tensor:
            queries_PD = self._run_tower(history_TD, batch, weights)[pairs.place_P].float()
            return sampled_logits(self.similarity.queries(queries_PD), items_ND, pairs.item_P1K) * self.similarity.scale

        own_P1K = scores_by(self)
        with torch.no_grad():
            return own_P1K, scores_by(self.reference)

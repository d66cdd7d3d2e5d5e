"""The retrieval model: item vectors -> tower -> loss. Single device; sharding is applied beside it.

B examples, T packed tokens, D width, K candidates, N max length.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from gr.batch import EvaluationBatch, RetrievalBatch
from gr.config.retrieval import RetrievalConfig
from gr.embeddings import build_tables, candidate_feature, lookup, sequence_vectors, with_candidates
from gr.ops.dropout import dropout
from gr.schema import DataSchema
from gr.sequence import JaggedSequence
from gr.tasks import Candidates, build_similarity, retrieval_loss
from gr.towers import build_tower


class Weights(Protocol):
    """The dense part that reads a history: position [N, D], and the tower."""

    position: nn.Parameter
    tower: nn.Module


class RetrievalModel(nn.Module):
    """p(next item | history), trained at every position (arXiv 2402.17152, §2.2). Build it on meta."""

    fsdp_modules = ("tower",)

    def __init__(self, config: RetrievalConfig, schema: DataSchema) -> None:
        super().__init__()
        self.dim, self.max_length = config.model.dim, config.data.max_length
        self.input_dropout = config.model.input_dropout
        self.precision = config.trainer.precision
        self.tables = build_tables(
            config.tables(schema),
            {
                table: [name for column in columns for name in (column, candidate_feature(column))]
                for table, columns in config.columns_by_table(schema).items()
            },
        )
        self.features = list(schema.event_features)
        self.item_features: Mapping[str, Tensor] = {}  # those features' ids by item, as the corpus has them
        self.position = nn.Parameter(torch.empty(self.max_length, self.dim))
        self.tower = build_tower(config.model.tower, dim=self.dim, max_length=self.max_length)
        self.similarity = build_similarity(config.task, self.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.position)

    def forward(
        self, batch: RetrievalBatch, candidates: Candidates, looked_up: Mapping[str, JaggedTensor] | None = None
    ) -> Tensor:
        """Sum of -log p(next item) over the T positions, a scalar in nats.

        looked_up: what the tables have for with_candidates(batch.features, candidates.ids_K, item_features); None: look
        it up.
        """
        if looked_up is None:
            looked_up = self.tables(with_candidates(batch.features, candidates.ids_K, self.item_features))
        history_TD, items_KD = sequence_vectors(looked_up, self.dim, self.features)
        queries_TD = self._run_tower(history_TD, batch, self)
        return retrieval_loss(queries_TD.float(), items_KD, candidates, self.similarity).sum()

    def queries(self, batch: EvaluationBatch, weights: Weights | None = None) -> Tensor:
        """Float [B, D]: the tower's output at the newest token of each example; zero where there is no history.

        weights: has the position vectors and the tower to use; None: the model's own.
        """
        nothing = batch.target_ids_B.new_empty(0)
        history_TD, _ = lookup(self.tables, batch.features, nothing, self.dim, self.item_features)
        outputs_TD = self._run_tower(history_TD, batch, self if weights is None else weights)
        lengths_B = batch.features.lengths()
        last_B = lengths_B.cumsum(0) - 1
        outputs = outputs_TD.new_zeros(len(lengths_B), self.dim)
        outputs[lengths_B > 0] = outputs_TD[last_B[lengths_B > 0]]
        return outputs.float()

    def user_vectors(self, batch: EvaluationBatch, weights: Weights | None = None) -> Tensor:
        """Float [B, C]: what the similarity compares with items. Of cosine and dot product, C is D, and the score of an
        item is the product with its vector.
        """
        return self.similarity.queries(self.queries(batch, weights)) * self.similarity.scale

    def item_vectors(self, ids_K: Tensor) -> Tensor:
        """Float [K, D] of the items and their features, from whichever ranks hold their rows."""
        one_empty_example = KeyedJaggedTensor(keys=["item_id"], values=ids_K.new_empty(0), lengths=ids_K.new_zeros(1))
        return lookup(self.tables, one_empty_example, ids_K, self.dim, self.item_features)[1]

    def _run_tower(self, history_TD: Tensor, batch: RetrievalBatch | EvaluationBatch, weights: Weights) -> Tensor:
        offsets_B1 = batch.features.offsets().long()
        lengths_B = offsets_B1.diff()
        tokens = len(history_TD)
        first_T = offsets_B1[:-1].repeat_interleave(lengths_B, output_size=tokens)
        place_T = torch.arange(tokens, device=history_TD.device) - first_T
        x_TD = history_TD * math.sqrt(self.dim) + F.embedding(place_T, weights.position)
        x_TD = dropout(x_TD, self.input_dropout, self.training)
        sequence = JaggedSequence(x_TD, offsets_B1, self.max_length, batch.timestamps_T, batch.query_timestamps_T)
        with torch.autocast(x_TD.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return weights.tower(sequence).values_TD

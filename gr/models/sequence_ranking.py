"""Generative ranking: the actions a user takes, from the sequence of what they did. Single device.

B examples, T events, S tokens, P predictions, C tasks, D width.
Source: arXiv 2402.17152, section 2.2 and Table 1; the form with candidates is that of its public production code.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.config.ranking import ActionTask, RankingConfig, ValueTask
from gr.embeddings import build_tables
from gr.models.preprocessor import SequencePreprocessor
from gr.ops.dropout import dropout
from gr.schema import DataSchema
from gr.sequence import JaggedSequence
from gr.towers import build_tower


class SequenceRanker(nn.Module):
    """p(action | history, item) for the newest events of each example. Build it on meta."""

    fsdp_modules = ("tower", "head")

    def __init__(self, config: RankingConfig, schema: DataSchema) -> None:
        super().__init__()
        model = config.model
        self.input_dropout, self.precision = model.input_dropout, config.trainer.precision
        self.uses_candidates = config.task.supervision == "candidates"
        self.dim = model.dim
        self.event_features, self.contextual = [ITEM_FEATURE, *schema.event_features], list(schema.contextual)
        self.tables = build_tables(config.tables(schema), config.columns_by_table(schema))
        self.tokens = SequencePreprocessor(
            model,
            max_events=config.data.max_length,
            actions=len(schema.actions),
            contextual=len(schema.contextual),
            numeric=len(schema.contextual_numeric),
        )
        self.tower = build_tower(model.tower, dim=model.dim, max_length=self.tokens.max_length)
        self.head = Head(model.dim, model.head, len(config.task.tasks))

    def forward(self, batch: RankingBatch, looked_up: Mapping[str, JaggedTensor] | None = None) -> Tensor:
        """Outputs [P, C] for the newest batch.scored_B events of each example, in order: logits, or numbers.

        looked_up: what the tables have for batch.features; None: look it up.
        """
        looked_up = self.tables(batch.features) if looked_up is None else looked_up
        item_TD = torch.stack([looked_up[name].values()[:, : self.dim] for name in self.event_features]).sum(0)
        context = [looked_up[name].values()[:, : self.dim] for name in self.contextual]
        candidates_B = batch.scored_B if self.uses_candidates else None
        sequence, layout = self.tokens(batch, item_TD, context, candidates_B)
        values_SD = dropout(sequence.values_TD, self.input_dropout, self.training)
        encoded_SD = self._run_tower(sequence.with_values(values_SD))
        unscored_B = batch.features[ITEM_FEATURE].lengths() - batch.scored_B
        is_scored_T = layout.place_T >= unscored_B[layout.example_T]
        return self.head(encoded_SD[layout.item_T[is_scored_T]])

    def _run_tower(self, sequence: JaggedSequence) -> Tensor:
        with torch.autocast(sequence.values_TD.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.tower(sequence).values_TD.float()


def predictions(outputs_PC: Tensor, tasks: Sequence[ActionTask | ValueTask]) -> list[np.ndarray]:
    """The prediction of each task, float32 [P]: the probability of an action, or the number."""
    columns = zip(tasks, outputs_PC.float().cpu().T, strict=True)
    return [(output.sigmoid() if isinstance(task, ActionTask) else output).numpy() for task, output in columns]


class Head(nn.Module):
    """MLP with SiLU between layers, from normalised vectors [P, D] to [P, C]."""

    def __init__(self, dim: int, hidden: tuple[int, ...], tasks: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(nn.Linear(into, out) for into, out in pairwise((dim, *hidden, tasks)))

    def forward(self, x_PD: Tensor) -> Tensor:
        x = self.norm(x_PD)
        for layer in self.layers[:-1]:
            x = torch.nn.functional.silu(layer(x))
        return self.layers[-1](x)

"""The tables of a model that reads histories as they were trained, called as passes call packed ones."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gr.models.retrieval import RetrievalModel
from gr.models.sequence_ranking import SequenceRanker


class FloatTables(nn.Module):
    def __init__(self, model: SequenceRanker | RetrievalModel, features: Sequence[str]) -> None:
        super().__init__()
        configs = [config for config in model.tables.embedding_configs() if {*config.feature_names} & {*features}]
        self.weights = nn.ParameterList(model.tables.embeddings[config.name].weight for config in configs)
        self.places = [
            next(place for place, config in enumerate(configs) if name in config.feature_names) for name in features
        ]
        self.dim = model.dim

    def forward(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """ids: integers [n] of each feature. Returns float32 [n, D] of each."""
        return [
            F.embedding(own.long(), self.weights[place])[:, : self.dim]
            for own, place in zip(ids, self.places, strict=True)
        ]

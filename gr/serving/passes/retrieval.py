"""The forward pass of a retrieval model for a package: one history in, the vector that items are compared with out.

One history a call, so that no shape depends on a value; the last layer computes its newest token only. T tokens, F
features of an item, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gr.models.retrieval import RetrievalModel
from gr.serving.passes.tower_layers import layers_of


class QueryPass(nn.Module):
    """A retrieval model's `user_vectors` for one history of at least one token, in fp32."""

    def __init__(self, model: RetrievalModel, tables: nn.Module) -> None:
        """tables: ids of the F features, each [T], to their vectors, each [T, D].

        Raises ServingError for a tower without such a pass.
        """
        super().__init__()
        self.tables, self.scale = tables, math.sqrt(model.dim)
        self.position, self.similarity = model.position, model.similarity
        self.layers = layers_of(model.tower, max_length=model.max_length)

    def forward(self, ids_FT: Tensor, times_T: Tensor) -> Tensor:
        """float32 [D]: its dot product with an item's vector is the score.

        ids_FT: int32, of the items, oldest first, and of their features; within their tables, which is not checked.
        times_T: int64 seconds of the events; a tower that reads no time ignores them.
        """
        T = ids_FT.shape[1]
        items_TD = torch.stack(self.tables(ids_FT.unbind(0))).sum(0)
        place_T = torch.arange(T)
        x_TD = items_TD * self.scale + F.embedding(place_T, self.position)
        # An event predicts its successor at the successor's time, and the newest one at its own.
        asked_T = times_T[(place_T + 1).clamp(max=T - 1)]
        newest_1D = self.layers.newest(x_TD, torch.stack([times_T, asked_T]))
        return (self.similarity.queries(newest_1D) * self.similarity.scale)[0]

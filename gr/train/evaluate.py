"""Leave-one-out evaluation over the full corpus; the same numbers at every world size."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from gr.batch import EvaluationBatch
from gr.dist import World
from gr.models.retrieval import RetrievalModel
from gr.tasks import CorpusRanker


@torch.no_grad()
def user_ranks(model: RetrievalModel, batches: Iterable[EvaluationBatch], corpus_C: Tensor, world: World) -> np.ndarray:
    """Rank of each user's target, float64 [users], in the data's order, on every rank. 1 is best.

    All ranks call it together, with as many batches each.
    """
    was_training = model.training
    model.eval()
    ranker = CorpusRanker(corpus_C, model.item_vectors, model.similarity, world)
    ranks, valid = [], []
    for batch in batches:
        batch = batch.to(world.device)
        ranks.append(ranker.ranks(model.queries(batch), batch))
        valid.append(batch.valid_B)
    model.train(was_training)
    everyone = torch.cat(world.all_gather_variable(torch.cat(ranks)))
    counted = torch.cat(world.all_gather_variable(torch.cat(valid).to(torch.int64))).bool()
    return everyone[counted].cpu().numpy()

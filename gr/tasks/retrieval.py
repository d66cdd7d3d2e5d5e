"""The retrieval loss: each position's next item against candidates. No (tokens x negatives x width) tensor is made.

T tokens, K items, D width, S negatives a token.
"""

import torch
from torch import Tensor

from gr.ops.linear_cross_entropy import linear_cross_entropy
from gr.ops.sampled_logits import sampled_logits
from gr.tasks.negatives import Candidates
from gr.tasks.similarity import Similarity

# What a negative that happens to be the target gets for a logit (generative-recommenders, sampled_softmax.py).
HIT_LOGIT = -5e4


def retrieval_loss(queries_TD: Tensor, items_KD: Tensor, candidates: Candidates, similarity: Similarity) -> Tensor:
    """-log p(target), float [T].

    With negatives of its own, or shared ones: softmax over the target and the negatives (arXiv 2402.17152, §2.2).
    Else softmax over all K items, corrected by log Q where it is given (Yi et al., RecSys 2019, Eq. 3).
    """
    queries_TD, items_KD = similarity.queries(queries_TD), similarity.items(items_KD)
    positive_T = candidates.positive_T
    if candidates.negative_TS is not None:
        index = torch.cat([positive_T[:, None], candidates.negative_TS], dim=1)
        logits = sampled_logits(queries_TD, items_KD, index) * similarity.scale
        return _sampled_softmax(logits, candidates.negative_TS == positive_T[:, None])
    if candidates.shared_S is not None:
        shared = queries_TD @ items_KD[candidates.shared_S].T
        own = sampled_logits(queries_TD, items_KD, positive_T[:, None])
        logits = torch.cat([own, shared], dim=1) * similarity.scale
        return _sampled_softmax(logits, candidates.shared_S == positive_T[:, None])
    bias = None if candidates.log_q_K is None else -candidates.log_q_K
    return linear_cross_entropy(queries_TD, items_KD, positive_T, scale=similarity.scale, bias_K=bias)


def _sampled_softmax(logits_T1S: Tensor, hit_TS: Tensor) -> Tensor:
    """logits_T1S: the target's logit first, then the negatives'. hit_TS: negatives that are the target."""
    masked = logits_T1S[:, 1:].float().masked_fill(hit_TS, HIT_LOGIT)
    positive = logits_T1S[:, 0].float()
    return torch.logaddexp(masked.logsumexp(dim=1), positive) - positive

"""The loss of a softmax over a target and a few sampled negatives. Letters as in reference.py; S negatives a token."""

import torch
from torch import Tensor

from gr.ops.backend import backend_for
from gr.ops.sampled_logits import check_arguments, sampled_logits
from gr.ops.sampled_logits.native import sampled_softmax_native

# What a negative that happens to be the target gets for a logit (generative-recommenders, sampled_softmax.py).
HIT_LOGIT = -5e4


def sampled_softmax(
    queries_TD: Tensor, items_KD: Tensor, positive_T: Tensor, negative_TS: Tensor, *, scale: float
) -> Tensor:
    """-log of the target's share of exp(scale queries . items), over the target and its negatives; float [T].

    queries_TD, items_KD: as in sampled_logits. positive_T: int64 [T], rows of items_KD; negative_TS: int64 [T, S]. A
    negative that is the target does not count. scale: positive.
    The C++ operator computes loss and gradient without a tensor of logits; elsewhere they come from sampled_logits.
    Raises ValueError and IndexError as sampled_logits does.
    Source: arXiv 2402.17152, section 2.2.
    """
    if negative_TS.shape[:1] != positive_T.shape or positive_T.dtype != negative_TS.dtype:
        raise ValueError(
            f"positive_T {positive_T.dtype} {list(positive_T.shape)} and negative_TS {negative_TS.dtype} "
            f"{list(negative_TS.shape)} must be int64 of [T] and [T, S]"
        )
    if queries_TD.dtype != torch.float64 and backend_for(queries_TD.device) == "native":
        check_arguments(queries_TD, items_KD, negative_TS)
        return sampled_softmax_native(queries_TD, items_KD, positive_T, negative_TS, scale)
    index = torch.cat([positive_T[:, None], negative_TS], dim=1)
    logits_T1S = sampled_logits(queries_TD, items_KD, index) * scale
    return softmax_of_first(logits_T1S, negative_TS == positive_T[:, None])


def softmax_of_first(logits_T1S: Tensor, hit_TS: Tensor) -> Tensor:
    """-log p of the first logit, float [T]. hit_TS: the others that do not count."""
    dtype = torch.promote_types(logits_T1S.dtype, torch.float32)
    masked = logits_T1S[:, 1:].to(dtype).masked_fill(hit_TS, HIT_LOGIT)
    positive = logits_T1S[:, 0].to(dtype)
    return torch.logaddexp(masked.logsumexp(dim=1), positive) - positive

"""Losses of one binary task, from logits, so that no probability is rounded to 0 or 1 on the way.

B examples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.config.dlrm import BCELoss, MSELoss, RankingLoss, WeightedBCELoss


def ranking_loss(logits_B: Tensor, labels_B: Tensor, loss: RankingLoss) -> Tensor:
    """Loss of each example, float32 [B] (float64 of float64 logits); labels lie in [0, 1].

    facebookresearch/dlrm has the same losses of p = sigmoid(logit); its BCE cuts log p at -100, this one is exact.
    """
    logits_B = logits_B.to(torch.promote_types(logits_B.dtype, torch.float32))
    labels_B = labels_B.to(logits_B.dtype)
    match loss:
        case BCELoss():
            return F.binary_cross_entropy_with_logits(logits_B, labels_B, reduction="none")
        case WeightedBCELoss(negative_weight=negative, positive_weight=positive):
            clicked, skipped = positive * labels_B, negative * (1 - labels_B)
            return -clicked * F.logsigmoid(logits_B) - skipped * F.logsigmoid(-logits_B)
        case MSELoss():
            return (logits_B.sigmoid() - labels_B).square()

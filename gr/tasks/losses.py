"""Losses of retrieval, of a click and of several actions at once, from logits.

No (tokens x negatives x width) tensor is made, and no probability is rounded to 0 or 1 on the way.

B examples, T tokens, K items, D width, S negatives a token, P predictions, C tasks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gr.config.click import BCELoss, ClickLoss, MSELoss, WeightedBCELoss
from gr.config.ranking import ActionTask, ValueTask
from gr.config.retrieval import LOSS_CHUNK
from gr.ops.linear_cross_entropy import linear_cross_entropy
from gr.ops.sampled_logits import sampled_logits
from gr.ops.sampled_logits.softmax import sampled_softmax, softmax_of_first
from gr.tasks.negatives import Candidates
from gr.tasks.similarity import PAIR_FLOATS, MixtureOfLogits, Similarity


def retrieval_loss(queries_TD: Tensor, items_KD: Tensor, candidates: Candidates, similarity: Similarity) -> Tensor:
    """-log p(target), float [T].

    With negatives of its own, or shared ones: softmax over the target and the negatives (arXiv 2402.17152, §2.2).
    Else softmax over all K items, corrected by log Q where it is given (Yi et al., RecSys 2019, Eq. 3).
    Of a mixture of logits the load-balance loss is part of it, times its weight.
    """
    queries_TD, items_KD = similarity.queries(queries_TD), similarity.items(items_KD)
    positive_T = candidates.positive_T
    if isinstance(similarity, MixtureOfLogits):
        return _mixture_loss(queries_TD, items_KD, candidates, similarity)
    if candidates.negative_TS is not None:
        return sampled_softmax(queries_TD, items_KD, positive_T, candidates.negative_TS, scale=similarity.scale)
    if candidates.shared_S is not None:
        shared = queries_TD @ items_KD[candidates.shared_S].T
        own = sampled_logits(queries_TD, items_KD, positive_T[:, None])
        logits = torch.cat([own, shared], dim=1) * similarity.scale
        return softmax_of_first(logits, candidates.shared_S == positive_T[:, None])
    bias = None if candidates.log_q_K is None else -candidates.log_q_K
    return linear_cross_entropy(queries_TD, items_KD, positive_T, scale=similarity.scale, bias_K=bias, chunk=LOSS_CHUNK)


def _mixture_loss(queries_TC: Tensor, items_KC: Tensor, candidates: Candidates, similarity: MixtureOfLogits) -> Tensor:
    """The same losses of scores that are no products; a few tokens at a time, computed again in backward."""
    bias_K = None if candidates.log_q_K is None else -candidates.log_q_K
    shared_S, negative_TS = candidates.shared_S, candidates.negative_TS
    shared_SC = None if shared_S is None else items_KC[shared_S]

    def loss_of(queries_tC: Tensor, positive_t: Tensor, negative_tS: Tensor | None) -> Tensor:
        if negative_tS is not None:
            index_tS = torch.cat([positive_t[:, None], negative_tS], dim=1)
            scores, balance_t = similarity.pairs(queries_tC, items_KC[index_tS])
            loss_t = softmax_of_first(scores, negative_tS == positive_t[:, None])
        elif shared_S is not None and shared_SC is not None:
            scores, balance_t = similarity.pairs(queries_tC, items_KC[positive_t][:, None], shared_SC)
            loss_t = softmax_of_first(scores, shared_S == positive_t[:, None])
        else:
            scores, balance_t = similarity.pairs(queries_tC, items_KC)
            loss_t = F.cross_entropy(scores if bias_K is None else scores + bias_K, positive_t, reduction="none")
        return loss_t + similarity.config.balance * balance_t

    drawn = shared_S if negative_TS is None else negative_TS
    compared = len(items_KC) if drawn is None else 1 + drawn.shape[-1]
    at_once = max(1, PAIR_FLOATS // (compared * similarity.pair_floats))
    losses = []
    for first in range(0, max(1, len(queries_TC)), at_once):  # a rank without tokens has gradients too, of zero
        part = slice(first, first + at_once)
        negative_tS = None if negative_TS is None else negative_TS[part]
        losses.append(
            checkpoint(loss_of, queries_TC[part], candidates.positive_T[part], negative_tS, use_reentrant=False)
        )
    return torch.cat(losses)


def click_loss(logits_B: Tensor, labels_B: Tensor, loss: ClickLoss) -> Tensor:
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


def multitask_loss(outputs_PC: Tensor, labels_PC: Tensor, tasks: Sequence[ActionTask | ValueTask]) -> Tensor:
    """Weighted sum over the tasks for each prediction, float32 [P].

    A bce task's output is a logit, its label 0 or 1; an mse task's output is the number itself.
    """
    outputs_PC = outputs_PC.float()
    terms = [
        task.weight
        * (
            F.binary_cross_entropy_with_logits(output_P, label_P, reduction="none")
            if isinstance(task, ActionTask)
            else (output_P - label_P).square()
        )
        for task, output_P, label_P in zip(tasks, outputs_PC.unbind(1), labels_PC.unbind(1), strict=True)
    ]
    return torch.stack(terms).sum(0)

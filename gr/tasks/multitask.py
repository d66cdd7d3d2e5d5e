"""Losses of several tasks at once. S predictions, C tasks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gr.config.generative import ActionTask, ValueTask


def multitask_loss(outputs_SC: Tensor, labels_SC: Tensor, tasks: Sequence[ActionTask | ValueTask]) -> Tensor:
    """Weighted sum over the tasks for each prediction, float32 [S].

    A bce task's output is a logit, its label 0 or 1; an mse task's output is the number itself.
    """
    outputs_SC = outputs_SC.float()
    terms = [
        task.weight
        * (
            F.binary_cross_entropy_with_logits(output_S, label_S, reduction="none")
            if isinstance(task, ActionTask)
            else (output_S - label_S).square()
        )
        for task, output_S, label_S in zip(tasks, outputs_SC.unbind(1), labels_SC.unbind(1), strict=True)
    ]
    return torch.stack(terms).sum(0)

import torch

from gr.config.ranking import ActionTask, ValueTask
from gr.tasks.losses import multitask_loss


def test_weighted_sum_of_the_published_losses() -> None:
    outputs = torch.tensor([[0.3, 2.0], [-1.0, 0.5]], requires_grad=True)
    labels = torch.tensor([[1.0, 1.5], [0.0, 0.0]])
    tasks = (ActionTask(action="like", weight=2.0), ValueTask(kind="mse", value="watched", weight=0.5))
    probability = torch.sigmoid(outputs[:, 0])
    expected = -2 * torch.log(torch.where(labels[:, 0] == 1, probability, 1 - probability)) + 0.5 * (
        (outputs[:, 1] - labels[:, 1]) ** 2
    )
    found = multitask_loss(outputs, labels, tasks)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), outputs)[0] for loss in (found, expected)))

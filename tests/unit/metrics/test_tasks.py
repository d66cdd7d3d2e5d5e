import math

import numpy as np
import pytest
import torch

from gr.config.ranking import ActionTask, ValueTask
from gr.dist import World
from gr.errors import DataError, TrainingError
from gr.metrics.prequential import PrequentialMetrics
from gr.metrics.ranking import LifetimeMetrics, RankingMetrics
from gr.metrics.tasks import MultiTaskMetrics, RegressionMetrics
from tests.support.ranks import run_ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
TASKS = (ActionTask(action="like"), ValueTask(kind="mse", value="watched"))


def drawn(seed: int = 0, size: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    outputs = torch.randn(size, 2, generator=random)
    labels = torch.stack([torch.rand(size, generator=random).round(), torch.rand(size, generator=random)], dim=1)
    return outputs, labels, torch.randint(0, 5, (size,), generator=random)


def by_user(world: World, tasks: tuple = TASKS) -> MultiTaskMetrics:
    return MultiTaskMetrics(tasks, world, lambda name: RankingMetrics(name, world, grouped=True))


def test_each_task_has_its_own() -> None:
    outputs, labels, users = drawn()
    metrics = by_user(ALONE)
    metrics.update(outputs, labels, users)
    alone = RankingMetrics("like", ALONE, grouped=True)
    alone.update(outputs[:, 0], labels[:, 0], groups_B=users)
    error = (outputs[:, 1] - labels[:, 1]).double()
    assert metrics.compute() == pytest.approx(
        {f"like/{name}": value for name, value in alone.compute().items()}
        | {
            "watched/mse": float(error.square().mean()),
            "watched/label_variance": float(np.var(labels[:, 1].double().numpy())),
            "watched/examples": 60,
        }
    )


def test_as_training_goes_there_is_a_window_and_a_lifetime() -> None:
    first, second = drawn(0), drawn(1)
    metrics = MultiTaskMetrics(TASKS, ALONE, lambda name: PrequentialMetrics(name, ALONE, window=60))
    newest, all_of_them = RankingMetrics("like", ALONE), LifetimeMetrics("like", ALONE)
    for outputs, labels, users in (first, second):
        metrics.update(outputs, labels, users)
        all_of_them.update(outputs[:, 0], labels[:, 0])
    newest.update(second[0][:, 0], second[1][:, 0])
    values = metrics.compute()
    assert {name: values[f"like/{name}"] for name in newest.compute()} == pytest.approx(newest.compute())
    lifetime = all_of_them.compute()
    assert lifetime["examples"] == 120
    assert {name: values[f"like/lifetime/{name}"] for name in lifetime} == pytest.approx(lifetime)
    assert values["watched/examples"] == 120


def halves(world: World) -> dict[str, float]:
    outputs, labels, users = drawn()
    metrics = by_user(world)
    mine = slice(0, 40) if world.rank == 0 else slice(40, 60)
    metrics.update(outputs[mine], labels[mine], users[mine])
    return metrics.compute()


def test_ranks_agree() -> None:
    metrics = by_user(ALONE)
    metrics.update(*drawn())
    for values in run_ranks(halves, 2):
        assert values == pytest.approx(metrics.compute())


def test_nothing_to_measure_and_divergence() -> None:
    metrics = RegressionMetrics("watched", ALONE)
    with pytest.raises(DataError, match="task 'watched': no example"):
        metrics.compute()
    metrics.update(torch.tensor([math.nan]), torch.tensor([1.0]))
    with pytest.raises(TrainingError, match="task 'watched': predictions are not finite"):
        metrics.compute()


@pytest.mark.parametrize("first", [False, True])
def test_a_task_of_one_class_has_what_exists_and_says_why_the_rest_does_not(first: bool) -> None:
    outputs, labels, users = drawn()
    labels[:, 1] = 0
    tasks = (TASKS[0], ActionTask(action="rare"))
    metrics = by_user(ALONE, tasks[::-1] if first else tasks)
    metrics.update(outputs.flip(1) if first else outputs, labels.flip(1) if first else labels, users)
    values = metrics.compute()
    assert [values[f"rare/{name}"] for name in ("ne", "auc", "calibration")] == [None] * 3
    assert (values["rare/base_rate"], values["rare/examples"]) == (0, 60) and values["rare/log_loss"] > 0
    assert values["like/auc"] is not None
    assert metrics.unmeasured == {
        "rare": "task 'rare': all 60 labels are 0, so there is no NE, AUC or calibration; measure more examples, or a "
        "larger window"
    }


def test_a_later_task_without_examples_says_so_and_the_first_is_an_error() -> None:
    with pytest.raises(DataError, match="task 'like': no example"):
        by_user(ALONE).compute()


def test_users_of_one_class_each_leave_no_gauc() -> None:
    metrics = by_user(ALONE)
    metrics.update(torch.tensor([[0.1, 0.0], [0.2, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 2]))
    values = metrics.compute()
    assert "like/gauc" not in values and (values["like/gauc_groups"], values["like/gauc_groups_skipped"]) == (0, 2)

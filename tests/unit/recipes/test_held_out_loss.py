"""evaluation.loss: the mean loss over all events of held-out users."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from gr.experiment import build
from gr.parallel.dense import unwrapped
from gr.recipes.base import open_recipe
from tests.support.tiny import tiny_config, write_tiny


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny(tmp_path / "train"), write_tiny(tmp_path / "test", users=21, seed=5)


@pytest.mark.parametrize("batch", [16, 4])
def test_it_is_the_mean_over_the_events(folders, tmp_path, alone, batch) -> None:
    train, test = folders
    evaluation = {"path": str(test), "loss": True, "global_batch_size": batch}
    config = tiny_config(train, tmp_path / "run", evaluation=evaluation, data={"max_length": 24})
    built = build(open_recipe(config), alone)
    measured = built.recipe.evaluate(built.model, alone, "test").metrics["loss"]
    # Token by token: the query after each prefix of a history against all 60 items.
    model, losses = unwrapped(built.model).eval(), []
    items = torch.arange(1, 61)
    with torch.no_grad():
        vectors = model.similarity.items(model.item_vectors(items))
        for holdout in range(1, 24):
            for each in built.recipe.user_batches(alone, target_from_end=holdout):  # type: ignore[attr-defined]
                there_B = each.valid_B & (each.features.lengths() > 0)
                logits = (model.user_vectors(each) @ vectors.T)[there_B]
                losses.append(cross_entropy(logits, each.target_ids_B[there_B] - 1, reduction="none"))
    assert measured == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_training_users_have_none(folders, tmp_path) -> None:
    with pytest.raises(ValidationError, match=r"evaluation\.loss=true takes all events of its users: name others"):
        tiny_config(folders[0], tmp_path, evaluation={"loss": True})


def test_a_mixture_has_none(folders, tmp_path) -> None:
    with pytest.raises(ValidationError, match=r"is of scores that are products: leave task\.similarity out"):
        tiny_config(
            folders[0],
            tmp_path,
            evaluation={"loss": True, "path": str(folders[1])},
            task={"similarity": {"kind": "mol"}, "negatives": {"kind": "full"}},
        )

"""A causal language model on 1, 2 and 4 gloo ranks: the same losses, weights and evaluation."""

from pathlib import Path

import numpy as np
import pytest
from torch.distributed.tensor import DTensor

from gr.config.causal_lm import CausalLMConfig
from gr.config.run import DenseConfig
from gr.dist import World
from gr.experiment import build
from gr.recipes.base import open_recipe
from gr.recipes.causal_lm import CausalLMRecipe
from gr.training.module import TrainModule
from tests.support.ranks import run_ranks
from tests.support.text import VOCABULARY, tiny_causal, write_text

STEPS = 5
LOSS, WEIGHT = 2e-6, 1e-5  # absolute; losses are about 3 nats, weights about 0.02


def train(world: World, config: CausalLMConfig) -> tuple[list[float], dict[str, np.ndarray], float]:
    recipe = open_recipe(config)
    assert isinstance(recipe, CausalLMRecipe)
    module = TrainModule(build(recipe, world).model, recipe.objective(world), config, world)
    losses = []
    with recipe.loader(world) as loader:
        for step in range(STEPS):
            loss = module.forward(module.prepare(next(loader), step))
            losses.append(world.all_reduce_sum([float(loss.total)])[0] / loss.tokens)
            module.backward(loss, step)
    evaluated = recipe.evaluate(module.model, world, "test").metrics["loss"]
    assert evaluated is not None
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.dense.items()}
    return losses, {name: p.detach().numpy().copy() for name, p in whole.items()}, evaluated


@pytest.mark.slow
def test_any_number_of_ranks_trains_the_same_model(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCABULARY, size).tolist() for size in random.integers(2, 30, 30)]
    prompts = [min(len(document), 5) for document in documents]
    folder = write_text(tmp_path / "data", documents, prompts=prompts)
    config = tiny_causal(
        folder,
        tmp_path / "run",
        optimizer={"kind": "adamw", "lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_grad_norm": 1.0},
        trainer={"steps": STEPS, "global_batch_size": 8},
        evaluation={"path": str(folder)},
    )
    # Two heads of keys, which two ranks can share.
    tower = config.model.tower.model_copy(update={"kv_heads": 2})
    config = config.model_copy(update={"model": config.model.model_copy(update={"tower": tower})})
    ((losses, weights, evaluated),) = run_ranks(train, 1, config)
    assert len(set(losses)) == STEPS
    for size, dense in ((2, DenseConfig()), (4, DenseConfig(strategy="fsdp", tensor_parallel=2))):
        laid_out = config.model_copy(update={"dense": dense})
        for own_losses, own_weights, own_evaluated in run_ranks(train, size, laid_out):
            np.testing.assert_allclose(own_losses, losses, rtol=0, atol=LOSS)
            assert abs(own_evaluated - evaluated) <= WEIGHT
            for name, weight in weights.items():
                np.testing.assert_allclose(own_weights[name], weight, rtol=0, atol=WEIGHT, err_msg=name)

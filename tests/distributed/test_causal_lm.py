"""A causal language model on 1, 2 and 4 gloo ranks: the same losses, weights and evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import gr
from gr import experiment
from gr.checkpoint import resolve
from gr.cli import main
from gr.config.causal_lm import CausalLMConfig
from gr.config.run import DenseConfig
from gr.dist import World
from gr.experiment import build
from gr.models.dense import dense_parameters
from gr.parallel.dense import unwrapped
from gr.recipes.base import open_recipe
from gr.recipes.causal_lm import CausalLMRecipe
from gr.training.module import TrainModule
from tests.support.llama import transformers
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


def train_and_gather(world: World, config: CausalLMConfig) -> dict[str, np.ndarray]:
    """A whole run with its checkpoint; returns the weights that the ranks read from it, put together."""
    experiment.train(config, world)
    with experiment.trained(config, resolve(config.run_dir), world) as built:
        dense = dense_parameters(unwrapped(built.model))
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in dense.items()}
        return {name: p.detach().numpy().copy() for name, p in whole.items()}


@pytest.mark.slow
def test_what_fsdp_and_tensor_ranks_saved_is_exported_whole(tmp_path: Path) -> None:
    """As safetensors and as a folder that `transformers` reads, from this process alone."""
    folder = write_text(tmp_path / "data", [list(range(2, VOCABULARY))] * 4)
    model = {"tower": {"kind": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24}, "dim": 16}
    config = tiny_causal(
        folder,
        tmp_path / "run",
        model=model,
        trainer={"steps": 2, "global_batch_size": 4, "writers": []},
        dense={"strategy": "fsdp", "tensor_parallel": 2},
    )
    expected = run_ranks(train_and_gather, 4, config)[0]
    out = tmp_path / "weights.safetensors"
    assert main(["export-weights", "--checkpoint", config.run_dir, "--out", str(out)]) == 0
    assert main(["export-hf", config.run_dir, "--out", str(tmp_path / "hf")]) == 0
    exported = load_file(out)
    theirs = transformers().LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        assert (exported[name].numpy() == weight).all(), name
    ids = torch.tensor([[2, 5, 3, 7]])
    own = gr.load(config.run_dir).logits(ids[0].tolist())
    assert float((own - theirs(ids).logits[0]).abs().max()) <= 5e-7 * float(own.abs().max())

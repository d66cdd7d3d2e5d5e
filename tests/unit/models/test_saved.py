"""gr.load and `gr evaluate` from a checkpoint alone: the training data is gone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gr
from gr.checkpoint import resolve
from gr.cli import main
from gr.config import RunConfig
from gr.dist import World
from gr.errors import CheckpointError, DamagedCheckpointError
from gr.experiment import evaluate, train
from gr.recipes.base import open_recipe
from tests.support.tiny import tiny_config, write_tiny
from tests.support.tiny_histories import tiny_ranking_config, write_histories
from tests.support.tiny_tabular import tiny_click_config, write_tiny_tabular


def retrieval(folder: Path) -> RunConfig:
    data, other = write_tiny(folder / "data"), write_tiny(folder / "other", seed=1)
    return tiny_config(data, folder / "run", trainer={"steps": 2}, evaluation={"path": str(other)})


def ranking(folder: Path) -> RunConfig:
    for name, seed in (("data", 0), ("other", 1)):
        write_histories(folder / name, seed=seed)
    evaluation = {"path": str(folder / "other")}
    return tiny_ranking_config(folder / "data", folder / "run", trainer={"steps": 2}, evaluation=evaluation)


def click(folder: Path) -> RunConfig:
    data, other = write_tiny_tabular(folder / "data"), write_tiny_tabular(folder / "other", rows=64, seed=1)
    return tiny_click_config(data, folder / "run", trainer={"steps": 2}, evaluation={"path": str(other)})


@pytest.mark.parametrize("configure", [retrieval, ranking, click])
def test_a_checkpoint_is_enough(tmp_path: Path, alone: World, configure: Callable[[Path], RunConfig]) -> None:
    config = configure(tmp_path)
    report = train(config, alone)
    assert report is not None and report["model"]
    shutil.rmtree(tmp_path / "data")
    again = evaluate(config, resolve(config.run_dir), alone, "test")
    assert again["model"] == report["model"]
    saved = gr.load(config.run_dir)
    assert saved.config == config and not saved.model.training
    assert not any(parameter.is_meta or not parameter.isfinite().all() for parameter in saved.model.parameters())


def test_the_loaded_model_is_the_trained_one(tmp_path: Path, alone: World) -> None:
    """Its vectors are not the initial ones, and what `gr export-weights` writes is its state, by the same names."""
    config = retrieval(tmp_path)
    train(config, alone)
    from gr.experiment import build

    built = build(open_recipe(config), alone)
    saved = gr.load(config.run_dir)
    model, schema = saved.model, saved.schema
    ids_K = torch.arange(1, schema.item_cardinality)
    assert not torch.equal(model.item_vectors(ids_K), built.model.module.item_vectors(ids_K)), "trained is not initial"
    out = tmp_path / "weights.safetensors"
    assert main(["export-weights", "--checkpoint", config.run_dir, "--out", str(out)]) == 0
    exported = load_file(out)
    assert exported.keys() == model.state_dict().keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in model.state_dict().items())


def test_wrong_checkpoints_are_one_line(tmp_path: Path, alone: World) -> None:
    config = retrieval(tmp_path)
    train(config, alone)
    path = resolve(config.run_dir)
    out = tmp_path / "w.safetensors"
    assert main(["export-weights", "--checkpoint", config.run_dir, "--out", str(tmp_path / "w.bin")]) == 2
    assert main(["export-weights", "--checkpoint", config.run_dir, "--out", str(tmp_path / "none/w.safetensors")]) == 2
    out.touch()
    assert main(["export-weights", "--checkpoint", config.run_dir, "--out", str(out)]) == 2
    (path / "schema.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"schema.json: is not what was written"):
        gr.load(path)
    progress = json.loads((path / "progress.json").read_text())
    del progress["format"]
    (path / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(CheckpointError, match="has format 1, this release reads format 2: train again, or use"):
        gr.load(path)

"""A resumed run repeats the uninterrupted one: bitwise at the same world size and plan, else within summation order."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from gr.checkpoint import CheckpointFolder, resolve
from gr.checkpoint.metadata import SafeReader, read_metadata
from gr.dist import World
from gr.errors import CheckpointError
from gr.experiment import evaluate, train
from gr.status import read_status
from gr.training.trainer import Trainer
from tests.support.ranks import RankError, run_ranks
from tests.support.tiny import tiny_config, write_tiny

STEPS, HALF = 12, 6
LOSS = 2e-5
PLANS = ("table_wise", "row_wise", "column_wise", "data_parallel")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny")


def configured(data: Path, run_dir: Path, *, sharding: str = "row_wise", optimizer: str = "adam", **sections):
    return tiny_config(
        data,
        run_dir,
        planner={"sharding": sharding, "allow_state_per_shard": True},
        # Dropout on: what is drawn must be repeated too.
        model={
            "input_dropout": 0.2,
            "tower": {"kind": "hstu", "layers": 1, "heads": 2, "qk_dim": 4, "v_dim": 4, "dropout": 0.2},
        },
        optimizer={"kind": "adamw", "schedule": {"kind": "cosine", "warmup_steps": 3}, "clip_grad_norm": 1.0},
        embeddings={"optimizer": {"kind": optimizer, "lr": 0.02}},
        trainer={"steps": STEPS},
        **{"checkpoint": {"every": HALF, "keep_last": 9}, **sections},
    )


def without_dropout(config):
    tower = config.model.tower.model_copy(update={"dropout": 0.0})
    model = config.model.model_copy(update={"tower": tower, "input_dropout": 0.0})
    return config.model_copy(update={"model": model})


def run(world: World, config) -> dict:
    return train(config, world)


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def resumed_from_half(full: Path, run_dir: Path) -> Path:
    """A run folder as it was after HALF steps."""
    name = CheckpointFolder(full / "checkpoints").final(HALF).name
    shutil.copytree(full / "checkpoints" / name, run_dir / "checkpoints" / name)
    return run_dir


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_same_world_size_resumes_bitwise(data, tmp_path, size, asynchronous):
    save = {"checkpoint": {"every": HALF, "keep_last": 9, "asynchronous": asynchronous}}
    full, part = tmp_path / "full", tmp_path / "part"
    whole = run_ranks(run, size, configured(data, full, **save))[0]
    resumed_from_half(full, part)
    again = run_ranks(run, size, configured(data, part, **save))[0]
    after = losses(part)
    assert sorted(after) == list(range(HALF + 1, STEPS + 1))
    assert after == {step: loss for step, loss in losses(full).items() if step > HALF}
    assert again["model"] == whole["model"]


def test_a_fused_optimizer_takes_the_rate_of_its_own_step(data, tmp_path):
    """fbgemm's update takes its rate along at the lookup: set later, it would be that of the step before."""
    full, part = tmp_path / "full", tmp_path / "part"
    run_ranks(run, 1, configured(data, full, optimizer="rowwise_adagrad"))
    resumed_from_half(full, part)
    run_ranks(run, 1, configured(data, part, optimizer="rowwise_adagrad"))
    assert losses(part) == {step: loss for step, loss in losses(full).items() if step > HALF}


def stopped_after(world: World, config, step: int) -> dict | None:
    if world.rank == 1:
        Trainer._is_orphan = lambda self: self.step == step - 1
    return train(config, world)


def records(run_dir: Path) -> list[dict]:
    """Without what a clock or the memory in use says."""
    measured = ("time", "_seconds", "_per_second", "_bytes")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(measured)} for line in lines]


@pytest.mark.parametrize("step", [HALF, STEPS])
def test_a_stop_where_an_evaluation_is_due_costs_neither_it_nor_the_best(data, tmp_path, step):
    """The stopped run saves and leaves; the resumed one evaluates before it goes on, or before its final report."""
    full, part = tmp_path / "full", tmp_path / "part"
    due = {"evaluation": {"every": HALF // 2}, "checkpoint": {"keep_last": 1}}
    whole = run_ranks(run, 2, configured(data, full, **due))[0]
    assert run_ranks(stopped_after, 2, configured(data, part, **due), step) == [None, None]
    assert read_status(part).state == "stopped"
    assert records(part)[-1] == {"kind": "train", **records(part)[-1], "step": step}, "no evaluation before it left"
    again = run_ranks(run, 2, configured(data, part, **due))[0]
    assert again["model"] == whole["model"] and records(part) == records(full)
    folders = [CheckpointFolder(run_dir / "checkpoints") for run_dir in (full, part)]
    assert folders[0].best() == folders[1].best() and folders[0].steps() == folders[1].steps()


@pytest.fixture(scope="module")
def saved_on_two(data, tmp_path_factory) -> dict[str, Path]:
    """Runs on 2 ranks under each plan, without dropout."""
    folders = {}
    for sharding in PLANS:
        folders[sharding] = tmp_path_factory.mktemp("runs") / sharding
        run_ranks(run, 2, without_dropout(configured(data, folders[sharding], sharding=sharding)))
    return folders


@pytest.mark.parametrize("size", [1, 4])
def test_other_world_sizes_continue_the_loss_curve(data, tmp_path, saved_on_two, size):
    part = resumed_from_half(saved_on_two["row_wise"], tmp_path / "part")
    run_ranks(run, size, without_dropout(configured(data, part)))
    before = losses(saved_on_two["row_wise"])
    assert all(abs(loss - before[step]) < LOSS for step, loss in losses(part).items())


@pytest.mark.parametrize(("saved", "loaded"), [pair for pair in itertools.product(PLANS, PLANS) if pair[0] != pair[1]])
def test_any_plan_loads_into_any_other(data, tmp_path, saved_on_two, saved, loaded):
    part = resumed_from_half(saved_on_two[saved], tmp_path / "part")
    run_ranks(run, 2, without_dropout(configured(data, part, sharding=loaded)))
    before = losses(saved_on_two[saved])
    assert all(abs(loss - before[step]) < LOSS for step, loss in losses(part).items())


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "rowwise_adamw"])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("row_wise", "column_wise"), ("column_wise", "row_wise"), ("column_wise", "table_wise")],
)
def test_rowwise_state_is_converted_between_column_shards(data, tmp_path, optimizer, saved, loaded):
    """The state of the column shards is averaged or repeated, so training goes on, if not with the same numbers."""
    full = tmp_path / "full"
    run_ranks(run, 2, without_dropout(configured(data, full, sharding=saved, optimizer=optimizer)))
    part = resumed_from_half(full, tmp_path / "part")
    run_ranks(run, 2, without_dropout(configured(data, part, sharding=loaded, optimizer=optimizer)))
    before, after = losses(full), losses(part)
    assert abs(after[HALF + 1] - before[HALF + 1]) < LOSS, "weights must be equal right after loading"
    assert all(abs(loss - before[step]) < 0.1 for step, loss in after.items())


def evaluated(world: World, config, checkpoint: Path) -> dict:
    return evaluate(config, checkpoint, world, "validation")


def test_evaluation_is_equal_on_1_2_and_4_ranks(data, saved_on_two):
    config = without_dropout(configured(data, saved_on_two["row_wise"]))
    checkpoint = CheckpointFolder(saved_on_two["row_wise"] / "checkpoints").final(STEPS)
    reports = [run_ranks(evaluated, size, config, checkpoint)[0] for size in (1, 2, 4)]
    assert reports[0]["model"] == reports[1]["model"] == reports[2]["model"]
    assert reports[0]["users"] == reports[2]["users"] > 80
    assert np.isfinite(reports[0]["model"]["mrr"])


def test_another_table_optimizer_is_refused_on_every_rank(data, tmp_path, saved_on_two):
    """Table-wise: one rank holds the table and sees the fault, the other must not go on alone."""
    part = resumed_from_half(saved_on_two["table_wise"], tmp_path / "part")
    config = without_dropout(configured(data, part, sharding="table_wise", optimizer="sgd"))
    with pytest.raises(RankError, match=r"tables item_id\.exp_avg: the checkpoint has it"):
        run_ranks(run, 1, config)
    with pytest.raises(RankError, match=r"is of another model:"):
        run_ranks(run, 2, config)


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_checkpoint_begin_another_run(data, tmp_path, saved_on_two, size):
    """One table of a run on two ranks, in a model with another tower; the rates are too small to move anything."""
    config = tiny_config(
        data,
        tmp_path / "run",
        trainer={"steps": 1, "global_batch_size": 8},
        optimizer={"kind": "adamw", "lr": 1e-30},
        embeddings={"optimizer": {"kind": "adam", "lr": 1e-30}},
        checkpoint={"load_from": str(saved_on_two["column_wise"]), "load_parts": ["item_id"]},
    )
    run_ranks(run, size, config)
    assert sorted(losses(tmp_path / "run")) == [1]
    before, after = (weights_of(path) for path in (saved_on_two["column_wise"], tmp_path / "run"))
    assert torch.equal(before["tables.item_id.weight"], after["tables.item_id.weight"])
    dense = {name for name in before.keys() & after.keys() if before[name].size() == after[name].size()}
    dense -= {"tables.item_id.weight"}
    assert dense and not any(torch.equal(before[name], after[name]) for name in dense), "it starts afresh"


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    path = resolve(run_dir)
    saved = read_metadata(path).state_dict_metadata
    tensors = {
        name: torch.empty(entry.size)
        for name, entry in saved.items()
        if name.startswith(("dense.", "tables.")) and name.endswith(".weight")
    }
    dcp.load(tensors, storage_reader=SafeReader(path), no_dist=True)
    return tensors


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (["item"], "no part item; did you mean 'item_id'?"),
        (["item_id"], "item_id.weight: the model has (61, 16), the checkpoint (61, 8); leave it out of checkpoint"),
    ],
)
def test_parts_that_do_not_fit_are_refused(data, tmp_path, saved_on_two, parts, why):
    checkpoint = {"load_from": str(saved_on_two["row_wise"]), "load_parts": parts}
    config = configured(data, tmp_path / "run", checkpoint=checkpoint)
    wider = config.model_copy(update={"model": config.model.model_copy(update={"dim": 16})})
    with pytest.raises(RankError) as refusal:
        run_ranks(run, 1, wider)
    assert why in str(refusal.value)


def test_other_held_out_targets_are_refused(data, tmp_path, saved_on_two):
    part = resumed_from_half(saved_on_two["row_wise"], tmp_path / "part")
    config = without_dropout(configured(data, part))
    config = config.model_copy(update={"data": config.data.model_copy(update={"train_holdout": 1})})
    with pytest.raises(RankError, match=r"was trained with data\.train_holdout=2, not 1"):
        run_ranks(run, 1, config)


def test_a_checkpoint_of_another_model_is_refused(data, tmp_path, saved_on_two):
    part = resumed_from_half(saved_on_two["row_wise"], tmp_path / "part")
    config = without_dropout(configured(data, part))
    wider = config.model_copy(update={"model": config.model.model_copy(update={"dim": 12})})
    with pytest.raises(RankError, match=CheckpointError.__name__) as refusal:
        run_ranks(run, 1, wider)
    assert "is of another model: model.dim is 8 there, 12 now" in str(refusal.value)

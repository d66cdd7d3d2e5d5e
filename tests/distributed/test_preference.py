"""The preference stage: from a retrieval run, the same on one rank and on two, and resumed as if uninterrupted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gr.checkpoint import CheckpointFolder
from gr.errors import CheckpointError, ConfigError, DataError
from gr.experiment import evaluate, train
from tests.support.ranks import RankError, run_ranks
from tests.support.tiny import tiny_config
from tests.support.tiny_preference import tiny_preference, write_rated

STEPS, HALF, LOSS = 8, 4, 2e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rated(tmp_path_factory.mktemp("data") / "rated")


@pytest.fixture(scope="module")
def retrieval(data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "retrieval"
    run_ranks(run, 1, tiny_config(data, run_dir, planner={"sharding": "row_wise"}))
    return run_dir


def run(world, config):
    return train(config, world)


def configured(data, run_dir, retrieval, sharding="row_wise", **sections):
    return tiny_preference(
        data,
        run_dir,
        retrieval,
        planner={"sharding": sharding},
        optimizer={"lr": 3e-3},
        trainer={"steps": STEPS},
        checkpoint={"load_from": str(retrieval), "every": HALF, "keep_last": 9},
        **sections,
    )


@pytest.fixture(scope="module")
def tuned(data, retrieval, tmp_path_factory) -> tuple[Path, dict]:
    run_dir = tmp_path_factory.mktemp("runs") / "tuned"
    return run_dir, run_ranks(run, 1, configured(data, run_dir, retrieval))[0]


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_the_report_compares_the_model_with_its_reference(tuned):
    run_dir, report = tuned
    assert losses(run_dir)[-1] < losses(run_dir)[0]
    before, after = report["reference"], report["model"]
    assert set(before) == set(after) and after["liked_mrr"] != before["liked_mrr"]
    ranks, reference = np.load(run_dir / "test-ranks.npy"), np.load(run_dir / "test-ranks-reference.npy")
    is_liked = np.load(run_dir / "test-is-liked.npy")
    assert report["liked_users"] == is_liked.sum()
    assert after["liked_hr@10"] == pytest.approx((ranks[is_liked] <= 10).mean())
    # Levels are 0 to 4, from 3 on they are liked.
    share = is_liked[ranks <= 10].mean()
    assert 3 * share <= after["level_of_top@10"] <= 2 + 2 * share
    change = report["change_and_standard_error"]["liked_hr@10"][0]
    assert change == pytest.approx((ranks[is_liked] <= 10).mean() - (reference[is_liked] <= 10).mean())
    assert report["held_out_pairs"]["implicit_reward_accuracy"] > 0.6  # taste is learnable
    later = report["change_and_standard_error"]["later_rating_of_top@10"]
    rise = after["later_rating_of_top@10"] - before["later_rating_of_top@10"]
    assert later[0] == pytest.approx(rise) and later[1] > 0
    assert report["later"]["events_of_a_user"] == 2 and after["later_in_top@10"] > 0


def test_the_reference_is_the_run_that_it_began_from(data, retrieval, tuned):
    saved = run_ranks(evaluation, 1, tiny_config(data, retrieval), retrieval)[0]
    assert {name: tuned[1]["reference"][name] for name in saved["model"]} == saved["model"]


def evaluation(world, config, run_dir):
    checkpoint = CheckpointFolder(run_dir / "checkpoints").latest()
    return evaluate(config, checkpoint, world, "test")


@pytest.mark.parametrize("sharding, dense", [("row_wise", "ddp"), ("data_parallel", "ddp"), ("row_wise", "fsdp")])
def test_two_ranks_train_as_one_does(data, retrieval, tuned, tmp_path, sharding, dense):
    config = configured(data, tmp_path / "two", retrieval, sharding, dense={"strategy": dense})
    report = run_ranks(run, 2, config)[0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tuned[0]), abs=LOSS)
    assert report["reference"] == tuned[1]["reference"]
    assert 0 < report["kl_to_reference"] == pytest.approx(tuned[1]["kl_to_reference"], rel=1e-3)
    assert report["held_out_pairs"]["pairs"] == tuned[1]["held_out_pairs"]["pairs"]


def test_a_resumed_run_is_the_uninterrupted_one(data, retrieval, tuned, tmp_path):
    name = CheckpointFolder(tuned[0] / "checkpoints").final(HALF).name
    shutil.copytree(tuned[0] / "checkpoints" / name, tmp_path / "part/checkpoints" / name)
    # The run that it began from may be gone: the reference is in the checkpoint.
    report = run_ranks(run, 1, configured(data, tmp_path / "part", tmp_path / "gone"))[0]
    assert losses(tmp_path / "part") == losses(tuned[0])[HALF:]
    assert report["model"] == tuned[1]["model"] and report["reference"] == tuned[1]["reference"]


EPOCH = 6  # steps


def longer(config):
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 3 * EPOCH})})


@pytest.fixture(scope="module")
def reward(data, retrieval, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "reward"
    run_ranks(run, 1, longer(configured(data, run_dir, retrieval, task={"loss": {"kind": "reward"}})))
    return run_dir


def test_dpo_and_the_reward_model_train(data, retrieval, reward, tmp_path):
    run_ranks(run, 1, longer(configured(data, tmp_path / "run", retrieval, task={"loss": {"kind": "dpo"}})))
    for run_dir in (reward, tmp_path / "run"):
        every = losses(run_dir)
        assert sum(every[-EPOCH:]) < sum(every[:EPOCH])


LISTS = {
    "rejection": {"kind": "rejection", "candidates": 12, "samples": 4},
    "ppo": {"kind": "ppo", "candidates": 12, "length": 4, "steps_per_policy": 3},
}


def of_lists(data, run_dir, retrieval, reward, kind, **sections):
    task = {"loss": LISTS[kind] | {"reward": str(reward)}}
    return configured(data, run_dir, retrieval, task=task, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LISTS)
def test_lists_that_a_reward_model_scores(data, retrieval, reward, tmp_path, kind):
    report = run_ranks(run, 1, longer(of_lists(data, tmp_path / "one", retrieval, reward, kind)))[0]
    assert report["model"]["reward_of_top@10"] > report["reference"]["reward_of_top@10"]
    run_ranks(run, 2, of_lists(data, tmp_path / "two", retrieval, reward, kind))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one")[:STEPS], abs=LOSS)
    # Resumed within the steps of one drawing policy, without the run of the reward model.
    name = CheckpointFolder(tmp_path / "two/checkpoints").final(HALF).name
    shutil.copytree(tmp_path / "two/checkpoints" / name, tmp_path / "part/checkpoints" / name)
    run_ranks(run, 2, of_lists(data, tmp_path / "part", retrieval, tmp_path / "gone", kind))
    assert losses(tmp_path / "part") == losses(tmp_path / "two")[HALF:]


def test_a_users_mistake_is_one_line(data, retrieval, reward, tuned, tmp_path):
    def fault(config) -> str:
        with pytest.raises((ConfigError, CheckpointError, DataError, RankError)) as raised:
            run_ranks(run, 1, config)
        return str(raised.value)

    alone = configured(data, tmp_path / "a", retrieval)
    alone = alone.model_copy(update={"checkpoint": alone.checkpoint.model_copy(update={"load_from": None})})
    assert "checkpoint.load_from is unset: a preference run begins from the weights of another" in fault(alone)
    other = configured(data, tmp_path / "b", retrieval, task={"temperature": 0.1})
    assert "was trained with task.temperature=0.05, not 0.1" in fault(other)
    first = {"liked": 1, "chosen": 1}
    equal = configured(
        data, tmp_path / "c", retrieval, task={"levels": {"kind": "ratings", "thresholds": (9.0,)}, **first}
    )
    assert "there is no pair to train on" in fault(equal)
    lists = of_lists(data, tmp_path / "d", retrieval, tuned[0], "ppo")
    assert "is no reward model: set task.loss.reward to a run of task.loss.kind=reward" in fault(lists)
    run_ranks(run, 1, tiny_config(data, tmp_path / "other", seed=7))
    lists = of_lists(data, tmp_path / "e", tmp_path / "other", reward, "rejection")
    assert "began from other weights than this run (position differs)" in fault(lists)
    many = lists.task.model_copy(update={"loss": lists.task.loss.model_copy(update={"candidates": 99})})
    assert "task.loss.candidates=99 and data.max_length" in fault(lists.model_copy(update={"task": many}))

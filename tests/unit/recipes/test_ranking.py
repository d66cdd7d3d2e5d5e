"""The generative ranking experiment on one rank: it learns what was planted, selects, evaluates, and refuses."""

import json
from pathlib import Path

import pytest

from gr.checkpoint import resolve
from gr.config.ranking import RankingConfig
from gr.dist import World
from gr.errors import CheckpointError, ConfigError, DataError
from gr.experiment import evaluate, train
from gr.schema import DataSchema
from tests.support.run_folder import reason_alone
from tests.support.tiny_histories import tiny_ranking_config, write_histories


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_histories(tmp_path / "data")
    return tmp_path / "data"


def longer(data: Path, run_dir: Path, **sections: object) -> RankingConfig:
    return tiny_ranking_config(
        data,
        run_dir,
        **{
            "trainer": {"steps": 120, "log_every": 40},
            "evaluation": {"every": 40},
            "optimizer": {"kind": "adamw", "lr": 1e-2},
        }
        | sections,
    )


@pytest.mark.slow
@pytest.mark.parametrize("supervision", ["all", "candidates"])
def test_learns_what_the_history_tells(data: Path, tmp_path: Path, alone: World, supervision: str) -> None:
    """A user likes 9 items of 10 or 1 of 10; the item says nothing."""
    base = tiny_ranking_config()
    task = {**base.task.model_dump(), "supervision": supervision}
    report = train(longer(data, tmp_path / "run", task=task, seed=2), alone)
    assert report is not None
    assert report["model"]["like/auc"] > 0.75
    assert report["model"]["watched/mse"] < 0.95 * report["model"]["watched/label_variance"]


@pytest.mark.slow
def test_the_report_is_of_the_best_checkpoint_and_evaluate_agrees(data: Path, tmp_path: Path, alone: World) -> None:
    config = longer(data, tmp_path / "run")
    report = train(config, alone)
    assert report is not None
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["like/auc"] for line in lines if line["kind"] == "validation"}
    assert sorted(scores) == [0, 40, 80, 120]
    trained = {step: score for step, score in scores.items() if step}
    assert report["step"] == max(trained, key=lambda step: trained[step])
    assert evaluate(config, resolve(tmp_path / "run"), alone, "test")["model"] == report["model"]
    again = evaluate(config, resolve(tmp_path / "run"), alone, "validation")["model"]
    assert again["like/auc"] == pytest.approx(scores[report["step"]])
    assert report["training_data"]["truncated_tokens"] > 0


def test_events_that_were_trained_on_are_not_evaluated(data: Path, tmp_path: Path, alone: World) -> None:
    config = tiny_ranking_config(data, tmp_path / "run", data={"path": str(data), "train_holdout": 2})
    assert train(config, alone) is not None
    with pytest.raises(ConfigError, match=r"the validation events were trained on \(data.train_holdout=2"):
        evaluate(config, resolve(tmp_path / "run"), alone, "validation")
    kept = tiny_ranking_config(data, tmp_path / "run", data={"path": str(data), "train_holdout": 4})
    with pytest.raises(CheckpointError, match=r"was trained with data.train_holdout=2, not 4"):
        evaluate(kept, resolve(tmp_path / "run"), alone, "validation")


def test_another_model_or_holdout_is_refused(data: Path, tmp_path: Path, alone: World) -> None:
    assert train(tiny_ranking_config(data, tmp_path / "run"), alone) is not None
    model = {**tiny_ranking_config().model.model_dump(), "head": [4]}
    with pytest.raises(CheckpointError, match="is of another model or task"):
        train(tiny_ranking_config(data, tmp_path / "run", model=model), alone)
    with pytest.raises(CheckpointError, match=r"trained with data.train_holdout=4, not 6: other events are held out"):
        train(tiny_ranking_config(data, tmp_path / "run", data={"path": str(data), "train_holdout": 6}), alone)


def test_data_that_do_not_fit(data: Path, tmp_path: Path, alone: World) -> None:
    other = tmp_path / "other"
    schema = write_histories(other)
    schema.model_copy(update={"actions": ["share", "like"]}).save(other)
    config = tiny_ranking_config(data, tmp_path / "run", evaluation={"path": str(other), "newest": 2})
    with pytest.raises(DataError, match=r"differ in actions \(schema.json\): prepare both alike"):
        train(config, alone)
    DataSchema.load(data).model_copy(update={"timestamps": False}).save(data)
    with pytest.raises(ConfigError, match=r"model.time is set, but .* has no timestamps: unset it"):
        train(tiny_ranking_config(data, tmp_path / "run"), alone)
    assert reason_alone(tmp_path / "run")


@pytest.mark.slow
def test_a_stream_is_predicted_before_it_is_trained_on(data: Path, tmp_path: Path, alone: World) -> None:
    """Each window once, the first by the untrained model; resuming inside a window repeats the losses."""

    def config(name: str, steps: int) -> RankingConfig:
        given = {"path": str(data), "train_holdout": 0, "max_length": 30, "stream": {"windows": 3}}
        trainer = {"steps": steps, "log_every": 1}
        return tiny_ranking_config(
            data, tmp_path / name, data=given, trainer=trainer, optimizer={"kind": "adamw", "lr": 1e-2}
        )

    write_histories(data, users=400)
    with pytest.raises(ConfigError, match=r"trainer.steps=99, but .* has 68 batches of 16 users for its one pass: set"):
        train(config("whole", 99), alone)
    runs = (("whole", 60), ("parts", 33), ("parts", 60))
    reports = {name: train(config(name, steps), alone) for name, steps in runs}

    def lines(name: str, kind: str) -> list[dict]:
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line for line in found if line["kind"] == kind]

    windows, again = ([(w["step"], w["window"], w["like/ne"]) for w in lines(n, "next_window")] for n in reports)
    assert windows == again
    assert [window for _, window, _ in windows] == [0, 1, 2]
    assert windows[0][0] == 0 and windows[2][2] < windows[0][2]
    losses, again = ([line["loss"] for line in lines(name, "train")] for name in reports)
    assert losses == again
    assert reports["whole"] is not None and reports["whole"]["model"] == {}

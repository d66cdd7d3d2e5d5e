"""Calibration rows are those of the evaluation, and give its metrics. P rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gr
from gr.config import RunConfig
from gr.errors import DataError, ServingError
from gr.serving.gate.accuracy_gate import GateReport, Limits
from gr.serving.gate.calibration import calibration
from tests.support.tiny_tabular import write_tiny_tabular

LIMITS = Limits()


def reference_report(run: RunConfig, **options: Any) -> GateReport:
    rows = calibration(gr.load(run.run_dir), **options)
    return rows.gate(rows.predict(rows.saved.model), LIMITS)


def evaluated(run: RunConfig, split: str) -> dict[str, float]:
    return gr.evaluate(run.run_dir, split=split)["model"]


def test_click_rows_are_those_of_the_evaluation(click_run: RunConfig) -> None:
    report = reference_report(click_run)
    expected = json.loads((Path(click_run.run_dir) / "report.json").read_text())["model"]
    assert report.verdict == "pass" and report.data == click_run.evaluation.path  # type: ignore[attr-defined]
    (task,) = report.tasks
    assert task.rows == task.units == expected["examples"] == 1_000
    assert report.measure("ne").reference == pytest.approx(expected["ne"], rel=1e-6)
    assert report.measure("auc").reference == pytest.approx(expected["auc"], rel=1e-9)
    assert task.calibration is not None and task.calibration[0] == pytest.approx(expected["calibration"], rel=1e-6)
    assert reference_report(click_run, rows=300).tasks[0].rows == 300


@pytest.mark.slow
def test_ranking_rows_are_both_splits(ranking_run: RunConfig) -> None:
    report = reference_report(ranking_run)
    test, validation = (evaluated(ranking_run, split) for split in ("test", "validation"))
    like, share, watched = report.tasks
    assert [task.task for task in report.tasks] == ["like", "share", "watched"]
    for task in report.tasks:
        assert task.rows == test[f"{task.task}/examples"] + validation[f"{task.task}/examples"]
        assert task.units < task.rows, "a user is one unit"
    (mse,) = (measure for measure in watched.measures if measure.name == "mse")
    errors = [part["watched/mse"] * part["watched/examples"] for part in (test, validation)]
    assert mse.reference == pytest.approx(sum(errors) / watched.rows, rel=1e-6)
    assert like.calibration is not None and share.calibration is not None
    assert reference_report(ranking_run, rows=10).tasks[0].rows < like.rows


@pytest.mark.slow
def test_retrieval_places_are_those_of_the_evaluation(retrieval_run: RunConfig) -> None:
    report = reference_report(retrieval_run)
    test, validation = (gr.evaluate(retrieval_run.run_dir, split=split) for split in ("test", "validation"))
    (task,) = report.tasks
    assert task.rows == test["users"] + validation["users"] and task.units == test["users"]
    for name in ("hr@10", "ndcg@10"):
        total = sum(each["users"] * each["model"][name] for each in (test, validation))
        assert report.measure(name).reference == pytest.approx(total / task.rows, rel=1e-9)


def test_other_rows_are_taken_where_they_are_named(click_run: RunConfig, tmp_path: Path) -> None:
    other = write_tiny_tabular(tmp_path / "more", rows=200, seed=2)
    report = reference_report(click_run, data=other)
    assert report.data == str(other) and report.tasks[0].rows == 200
    assert report.data_checksums != reference_report(click_run).data_checksums
    fewer = write_tiny_tabular(tmp_path / "fewer", rows=200, dense=("i1", "i2"))
    with pytest.raises(DataError, match="differ in dense"):
        reference_report(click_run, data=fewer)


def test_rows_that_were_trained_on_are_refused(click_run: RunConfig, ranking_run: RunConfig) -> None:
    for run, changes, message in (
        (click_run, {"evaluation": {"path": None}}, "trained without evaluation.path"),
        (ranking_run, {"data": {"train_holdout": 0}}, "every event of .* was trained on"),
    ):
        saved = gr.load(run.run_dir)
        sections = {name: getattr(saved.config, name).model_copy(update=values) for name, values in changes.items()}
        config = saved.config.model_copy(update=sections)
        changed = type(saved)(saved.model, saved.schema, config, saved.folder)
        with pytest.raises(ServingError, match=message):
            calibration(changed)


def test_a_kind_without_rows_is_named() -> None:
    with pytest.raises(ServingError, match="causal_lm models have no accuracy gate"):
        calibration(SimpleNamespace(config=SimpleNamespace(kind="causal_lm")))  # type: ignore[arg-type]


def test_histories_of_another_form_are_refused(retrieval_run: RunConfig, folder_of_another_kind: Path) -> None:
    with pytest.raises(DataError, match="differ in item_cardinality"):
        calibration(gr.load(retrieval_run.run_dir), data=folder_of_another_kind)


def test_outputs_are_rows_of_tasks(ranking_run: RunConfig) -> None:
    rows = calibration(gr.load(ranking_run.run_dir))
    outputs_PC = rows.predict(rows.saved.model)
    assert outputs_PC.shape[1] == 3 and np.isfinite(outputs_PC).all()

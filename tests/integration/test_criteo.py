"""DLRM on Criteo's public rows through the command line: prepare, plan, train, evaluate, and wrong calls."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gr.cli import main
from gr.config import dump_config
from tests.support import ROOT
from tests.support.run_folder import reason_alone
from tests.support.tiny import tiny_config, write_tiny

CONFIG = str(ROOT / "configs/dlrm/criteo-debug.yaml")
TRAIN_PARTS, TEST_PART = (0, 1), 6
STEPS, BATCH = 78, 256  # one pass over 20,000 rows
Prepared = dict[str, Path]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def prepared(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """train and test, with one vocabulary; `other`, the test rows with a vocabulary of their own."""
    source, folder = test_data / "criteo", tmp_path_factory.mktemp("criteo")
    parts = [str(source / f"terabyte-part-{number}.orc") for number in (*TRAIN_PARTS, TEST_PART)]
    first, *more, last = parts
    made = {name: folder / name for name in ("train", "test", "other")}
    calls = [
        ["--source", first, *more, "--out", str(made["train"]), "--threshold", "2"],
        ["--source", last, "--out", str(made["test"]), "--vocabulary", str(made["train"])],
        ["--source", last, "--out", str(made["other"]), "--threshold", "2"],
    ]
    for call in calls:
        assert main(["prepare", "criteo", *call]) == 0
    return made


def overrides(prepared: Prepared, run_dir: Path, *more: str) -> list[str]:
    paths = [f"data.path={prepared['train']}", f"evaluation.path={prepared['test']}", f"run_dir={run_dir}"]
    steps = [f"trainer.steps={STEPS}", f"trainer.global_batch_size={BATCH}", "trainer.log_every=39"]
    return [*paths, *steps, "device=cpu", *more]


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", CONFIG, *overrides(prepared, run_dir)]) == 0
    return run_dir


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """refused(*arguments): the one line that `gr` says, with exit code 2."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
        return lines[0].removeprefix("error: ")

    return run


@pytest.mark.data
def test_one_pass_learns_and_evaluate_repeats_its_report(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = json.loads((trained / "report.json").read_text())
    model = report["model"]
    assert model["examples"] == 10_000 and report["training_data"] == {"dropped_examples": 20_000 - STEPS * BATCH}
    assert model["ne"] < 1 and model["auc"] > 0.6, model
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "prequential"] == [39, 78]
    capfd.readouterr()
    assert main(["evaluate", "--checkpoint", str(trained)]) == 0
    out = capfd.readouterr().out
    assert f"{model['auc']:.4f}" in out and f"{model['ne']:.4f}" in out and "10,000 examples" in out


@pytest.mark.data
@pytest.mark.parametrize("name", ["criteo-kaggle", "criteo-terabyte", "mlperf-dlrm-v2"])
def test_debug_twins_of_the_published_recipes(prepared: Prepared, tmp_path: Path, name: str) -> None:
    folders = dict(prepared)
    if name == "mlperf-dlrm-v2":
        for part in ("train", "test"):
            folders[part] = tmp_path / part
            call = ["prepare", "multi-hot", "--source", str(prepared[part]), "--out", str(folders[part])]
            assert main(call) == 0
    config = str(ROOT / f"configs/dlrm/{name}-debug.yaml")
    assert (
        main(["train", config, *overrides(folders, tmp_path / "run", "trainer.steps=20", "trainer.log_every=5")]) == 0
    )
    model = json.loads((tmp_path / "run/report.json").read_text())["model"]
    assert model["examples"] == 10_000 and model["auc"] > 0.5, model


@pytest.mark.data
def test_the_plan_has_every_table(prepared: Prepared, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    call = ["plan", CONFIG, *overrides(prepared, tmp_path / "run"), "--topology", "cpux1", "--json", str(plan)]
    assert main(call) == 0
    placements = json.loads(plan.read_text())["placements"]
    assert [placement["table"] for placement in placements] == [f"c{number}" for number in range(1, 27)]
    assert main(["train", CONFIG, *overrides(prepared, tmp_path / "run", "trainer.steps=2"), "--plan", str(plan)]) == 0
    assert json.loads((tmp_path / "run/plan.json").read_text())["placements"] == placements


@pytest.mark.data
def test_more_steps_than_one_pass(prepared: Prepared, refused: Refused, tmp_path: Path) -> None:
    said = refused("train", CONFIG, *overrides(prepared, tmp_path / "run", "trainer.steps=79"))
    assert said == (
        f"trainer.steps=79, but {prepared['train']} has 78 batches of 256 rows for its one pass: set trainer.steps to "
        "78 or fewer, or to null and trainer.epochs to 2 or more"
    )
    assert reason_alone(tmp_path / "run")


@pytest.mark.data
def test_evaluation_data_of_another_vocabulary(
    prepared: Prepared, trained: Path, refused: Refused, tmp_path: Path
) -> None:
    """Ids that mean something else must not be looked up, in training and of a checkpoint."""
    other = f"evaluation.path={prepared['other']}"
    expected = f" and {prepared['other']} differ in sparse (schema.json): prepare both with the same"
    assert refused("train", CONFIG, *overrides(prepared, tmp_path / "run", other)).startswith(
        f"{prepared['train']}{expected}"
    )
    assert reason_alone(tmp_path / "run")
    said = refused("evaluate", "--checkpoint", str(trained), other)
    assert said.startswith(f"{trained}/checkpoints/step-") and expected in said


@pytest.mark.data
def test_data_of_another_kind(prepared: Prepared, trained: Path, refused: Refused, tmp_path: Path) -> None:
    histories = write_tiny(tmp_path / "histories")
    said = refused("train", CONFIG, *overrides(prepared, tmp_path / "run", f"data.path={histories}"))
    assert said.startswith(f"{histories}/schema.json: describes a ") and "this reads tabular folders" in said
    assert f"{tmp_path}/none: no such folder" in refused(
        "evaluate", "--checkpoint", str(trained), f"evaluation.path={tmp_path}/none"
    )


@pytest.mark.data
def test_a_checkpoint_of_another_kind(prepared: Prepared, trained: Path, refused: Refused, tmp_path: Path) -> None:
    """The run folder of a retrieval run, as run_dir and as checkpoint.load_from; and a ranking run's, for retrieval."""
    retrieval = tmp_path / "retrieval"
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(dump_config(tiny_config(write_tiny(tmp_path / "data"), retrieval, trainer={"steps": 2})))
    assert main(["train", str(tiny)]) == 0
    said = "is of another kind of experiment (task.kind); use another run_dir"
    assert said in refused("train", CONFIG, *overrides(prepared, retrieval))
    load_from = f"checkpoint.load_from={retrieval}"
    assert said in refused("train", CONFIG, *overrides(prepared, tmp_path / "run", load_from))
    assert said in refused("train", str(tiny), f"run_dir={trained}")
    histories_wanted = refused("evaluate", "--checkpoint", str(retrieval), f"data.path={prepared['test']}")
    assert "describes a tabular folder" in histories_wanted


@pytest.mark.data
def test_another_model_in_the_run_folder(prepared: Prepared, trained: Path, refused: Refused) -> None:
    said = refused("train", CONFIG, *overrides(prepared, trained, "model.top=[32,1]"))
    assert "is of another model: model." in said and " now. Use another run_dir" in said


@pytest.mark.data
def test_nothing_to_evaluate_on(trained: Path, refused: Refused) -> None:
    said = refused("evaluate", "--checkpoint", str(trained), "evaluation.path=null")
    assert said == "evaluation.path is unset: name the data folder to evaluate on, evaluation.path=PATH"

"""The configuration of ranking: how it is told from retrieval, what fits, and one clear line where it does not."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from gr.config import ClickConfig, RetrievalConfig, dump_config, load_config
from gr.config.click import BCELoss, MSELoss, WeightedBCELoss
from gr.config.dlrm import DCNInteraction, DotInteraction
from gr.errors import ConfigError
from tests.support import ROOT
from tests.support.tiny_tabular import tiny_click_config

BASE = """\
run_dir: runs/x
task: {kind: click}
data: {path: data/criteo}
model: {dim: 8, bottom: [16, 8], top: [4, 1]}
trainer: {steps: 100}
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "ranking.yaml"
    file.write_text(BASE)
    return str(file)


def fault(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_kind_of_task_decides(path: str) -> None:
    config = load_config(path)
    assert isinstance(config, ClickConfig)
    assert config.task.loss == BCELoss() and config.model.interaction == DotInteraction()
    assert not config.data.shuffle, "rows are in time order"
    said = fault(path, "task.kind=ranked")
    assert "task.kind: expected one of retrieval, preference, ranking, click, causal_lm, got 'ranked'" in said
    assert fault(path, "task.kind=[ranking]").endswith("ranking, click, causal_lm, got ['ranking']")
    assert fault(path, "task.kind=generative_ranking").endswith("task.kind: generative_ranking is now called ranking")
    assert fault(path, "task.kind=ranking").endswith("task.kind: ranking of rows by DLRM is now called click")
    Path(path).write_text("run_dir: runs/x\ndata: {path: data/ml}\ntrainer: {steps: 100}\n")
    assert isinstance(load_config(path), RetrievalConfig)


def test_what_is_written_reads_back(path: str, tmp_path: Path) -> None:
    config = load_config(
        path,
        [
            "model.interaction.kind=dcn",
            "model.interaction.rank=4",
            "task.loss={kind: wbce, positive_weight: 3.0}",
            "evaluation={path: data/test, every: 10, window: 50}",
        ],
    )
    assert isinstance(config, ClickConfig)
    assert config.model.interaction == DCNInteraction(rank=4)
    assert config.task.loss == WeightedBCELoss(positive_weight=3.0)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    squared = load_config(path, ["task.loss.kind=mse"])
    assert isinstance(squared, ClickConfig) and squared.task.loss == MSELoss()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.bottom=[16,4]", "bottom=[16, 4] must end with dim=8"),
        ("model.top=[4,2]", "top=[4, 2] must end with 1, the logit"),
        ("model.top=[]", "model.top"),
        ("model.bottom=[0,8]", "model.bottom"),
        ("model.dim=6", "model.dim"),
        (
            "model.interaction={kind: projection, branch1: [16], branch2: [12]}",
            "interaction.branch2=[12] must end with a multiple of dim=8",
        ),
        ("model.interaction.kind=fm", "model.interaction"),
        ("model.interaction.rank=4", "rank: unknown key"),
        ("evaluation.every=10", "every needs path: the data to evaluate on"),
        ("evaluation.window=0", "evaluation.window"),
        ("evaluation.global_batch_size=0", "evaluation.global_batch_size"),
        ("task.loss.kind=hinge", "task.loss"),
        ("task.loss={kind: wbce, negative_weight: 0}", "negative_weight"),
        ("data.max_length=20", "data.max_length: unknown key"),
        ("model.tower.layers=2", "model.tower: unknown key"),
        ("trainer.steps=null", "trainer.steps"),
    ],
)
def test_a_fault_names_its_place(path: str, override: str, said: str) -> None:
    message = fault(path, override)
    assert said in message and message.count("\n") <= 1, message


def test_a_section_that_is_missing(path: str) -> None:
    Path(path).write_text(BASE.replace("model:", "# model:"))
    assert "model: " in fault(path)


def test_the_tests_own_configuration(tmp_path: Path) -> None:
    config = tiny_click_config(tmp_path, tmp_path / "run", trainer={"steps": 3})
    assert (config.trainer.steps, config.trainer.global_batch_size) == (3, 24)
    with pytest.raises(ValidationError, match="must end with dim"):
        tiny_click_config(tmp_path, tmp_path / "run", model={"dim": 16})


def test_the_configuration_for_criteo_is_one_pass_over_six_of_seven_parts() -> None:
    """The best known rows of the public log are 70,000, in seven files."""
    config = load_config(ROOT / "configs/dlrm/criteo-debug.yaml")
    assert isinstance(config, ClickConfig)
    assert config.trainer.steps == 60_000 // config.trainer.global_batch_size
    assert config.embeddings.init == "uniform_rows" and not config.data.shuffle


def test_reading_a_ranking_configuration_imports_no_torch(path: str) -> None:
    check = f"import sys, gr.config; gr.config.load_config({path!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0

"""docs/design/extending.md: its tower from outside trains, and each patch touches the files that the page says."""

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import gr
from gr.config import dump_config
from gr.config.towers import TOWERS
from gr.errors import ConfigError
from gr.models import build_model
from gr.models.dense import dense_parameters
from gr.planner.estimate_dense import dense_work
from tests.support import ROOT
from tests.support.tiny import tiny_config, write_tiny

PAGE = (ROOT / "docs/design/extending.md").read_text()
PATCHES = ROOT / "tests/integration/patches"


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return text


@pytest.fixture
def my_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_tower.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("my_tower", None)
    TOWERS.remove("running_mean")


@pytest.mark.usefixtures("my_tower")
def test_the_tower_of_the_page_trains_from_outside(tmp_path: Path) -> None:
    whole = yaml.safe_load(dump_config(tiny_config(write_tiny(tmp_path / "data"), tmp_path / "run")))
    added = yaml.safe_load(block("yaml"))
    whole["plugins"], whole["model"]["tower"] = added["plugins"], added["model"]["tower"]
    whole["trainer"]["steps"] = 2
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole))
    config = gr.load_config(tmp_path / "mine.yaml")
    schema = config.load_schema()
    counted = dense_work(config.inventory(schema), 1).parameters
    assert counted == sum(p.numel() for p in dense_parameters(build_model(config, schema)).values())
    assert gr.train(config) is not None
    with pytest.raises(ConfigError, match=r"plugins: my_tower is Python code"):
        gr.load(tmp_path / "run")
    assert type(gr.load(tmp_path / "run", plugins=["my_tower"]).model.tower).__name__ == "RunningMean"


CHECKS = {
    "tower": """
from gr.config.towers import TOWERS
from gr.models.dense import dense_parameters
from gr.towers import build_tower
config = TOWERS.config("gru")(layers=3)
tower = build_tower(config, dim=8, max_length=5)
assert sum(p.numel() for p in tower.parameters()) == config.cost(8, 5, 4).parameters
""",
    "loss": """
import torch
from gr.config import load_config
from gr.tasks import click_loss
loss = load_config("configs/dlrm/clicks.yaml", ["task.loss={kind: focal, gamma: 1.0}"]).task.loss
assert click_loss(torch.zeros(2), torch.ones(2), loss).tolist() == [0.5 * -torch.tensor(0.5).log()] * 2
""",
    "optimizer": """
import torch
from gr.config.optim import DENSE_OPTIMIZERS
from gr.training.module import build_optimizer
config = DENSE_OPTIMIZERS.config("nadam")()
weight = torch.nn.Parameter(torch.ones(2))
optimizer = build_optimizer([weight], config)
weight.sum().backward()
optimizer.step()
assert optimizer.state[weight].keys() == config.states.keys()
""",
    "callback": """
from gr.config import load_config
from gr.config.run import CALLBACKS
extra = ["plugins=[gr.training.callbacks.parameter_norm]", "callbacks=[{kind: parameter_norm, every: 5}]"]
(config,) = load_config("configs/dlrm/clicks.yaml", extra).callbacks
assert CALLBACKS.target(config)(config).every == 5
""",
    "data_set": """
import pathlib
from gr.cli import main
from gr.data.dataset import Dataset
pathlib.Path("raw").mkdir()
pathlib.Path("raw/events.csv").write_text("timestamp,visitorid,event,itemid\\n9,4,view,70\\n8,4,view,71\\n7,2,view,70\\n")
assert main(["prepare", "retailrocket", "--source", "raw", "--out", "data"]) == 0
assert Dataset.open("data").read_row_group(0).columns["item_ids"].tolist() == [1, 2, 1]
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files"), [("tower", 2), ("loss", 2), ("optimizer", 1), ("callback", 1), ("data_set", 2)]
)
def test_what_an_addition_touches(tmp_path: Path, name: str, files: int) -> None:
    """The patch applies to gr as it is, touches so many files of it, and works."""
    patch = PATCHES / f"{name}.patch"
    touched = set(re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE))
    assert len(touched) == files and all(path.startswith("gr/") for path in touched)
    for folder in ("gr", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "--unsafe-paths", f"--directory={tmp_path}", str(patch)], cwd="/", check=True)
    done = subprocess.run([sys.executable, "-c", CHECKS[name]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

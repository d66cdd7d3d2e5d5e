"""Configurations by name: those that are installed with gr."""

from pathlib import Path

import pytest

from gr.cli import main
from gr.config import load_config, packaged
from gr.errors import ConfigError
from gr.planner.inventory import is_inventory, load_inventory

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_names_are_those_of_the_folder():
    files = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"{name}.yaml" for name in packaged.names()} == files


@pytest.mark.parametrize("name", packaged.names())
def test_each_is_read_from_any_folder_and_has_a_title(name):
    assert len(packaged.title(name)) > 10
    if name.startswith("scaling/"):  # tests/unit/scaling reads those, beside their data
        with pytest.raises(ConfigError, match=f"{name}: a grid of experiments: use gr scale {name}"):
            load_config(name)
    elif is_inventory(name):
        assert load_inventory(name).tables
    else:
        # Where sizes follow from the data there has to be some.
        sizes = ["sizes=written", "trainer.steps=1"] * (
            "sizes: data" in (packaged.CONFIGS / f"{name}.yaml").read_text()
        )
        assert load_config(name, ["seed=3", *sizes]).seed == 3


def test_a_file_of_that_name_is_meant_first():
    Path("retrieval").mkdir()
    Path("retrieval/smoke").write_text("run_dir: mine\ndata: {path: d}\ntrainer: {steps: 5}\n")
    assert load_config("retrieval/smoke").run_dir == "mine"


@pytest.mark.parametrize("typo", ["retrieval/smok", "configs/retrieval/smok.yaml", "smoke", "retreival/smoke.yaml"])
def test_a_typing_error_is_answered_with_the_nearest_name(typo):
    with pytest.raises(ConfigError) as error:
        load_config(typo)
    assert str(error.value) == f"{typo}: no such file; did you mean 'retrieval/smoke', which is installed with gr?"


def test_a_name_like_no_other_is_answered_with_the_command_that_lists_them():
    with pytest.raises(ConfigError, match="no such file; `gr config list` shows those installed with gr"):
        load_config("zzz")


def test_list(capsys):
    assert main(["config", "list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in packaged.names())
    assert "DLRM on 70,000 rows of Criteo's Terabyte log" in out

"""Registries: the kinds of a field, faults below them, and what a plugin may add."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import ValidationError

from gr.config import RECIPES, RetrievalConfig, json_schema, load_config
from gr.config.base import Registry, Section
from gr.config.optim import DENSE_OPTIMIZERS, TABLE_OPTIMIZERS
from gr.config.run import CALLBACKS
from gr.config.towers import TOWERS
from gr.errors import ConfigError


class Circle(Section):
    kind: Literal["circle"] = "circle"
    radius: int = 1


class Square(Section):
    kind: Literal["square"] = "square"
    side: int = 1


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("shape")
    registry.add(Circle, "math:pi")
    return registry


def test_a_kind_added_later_is_taken_at_once(shapes: Registry) -> None:
    class Drawing(Section):
        shape: Annotated[Section, shapes]

    with pytest.raises(ValidationError, match="union_tag_invalid"):
        Drawing.model_validate({"shape": {"kind": "square"}})
    shapes.add(Square, "math:tau")
    assert Drawing.model_validate({"shape": {"kind": "square", "side": 3}}).shape == Square(side=3)
    assert Drawing.model_validate_json('{"shape": {"kind": "circle"}}').model_dump() == {
        "shape": {"kind": "circle", "radius": 1}
    }


def test_faults_below_a_kind_keep_their_place(shapes: Registry) -> None:
    class Drawing(Section):
        shape: Annotated[Section, shapes]

    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate_json('{"shape": {"kind": "circle", "radius": "1", "colour": 3}}', strict=True)
    assert {error["loc"] for error in caught.value.errors()} == {
        ("shape", "circle", "radius"),
        ("shape", "circle", "colour"),
    }


def test_what_is_not_registered_is_an_error(shapes: Registry) -> None:
    with pytest.raises(ConfigError, match=r"Square is no registered shape; known: circle"):
        shapes.target(Square())
    shapes.add(Square, "math:no_such_name")
    with pytest.raises(ConfigError, match=r"shape 'square': module math has no no_such_name"):
        shapes.target(Square())

    class Other(Circle):
        pass

    with pytest.raises(ConfigError, match=r"shape 'circle' is already .*Circle; choose another kind"):
        shapes.add(Other, "math:e")


@pytest.mark.parametrize("registry", [TOWERS, RECIPES, DENSE_OPTIMIZERS, TABLE_OPTIMIZERS, CALLBACKS])
def test_every_registered_kind_exists(registry: Registry) -> None:
    for kind in registry:
        assert callable(registry.target_of(kind)), kind


def test_editors_know_every_registered_tower() -> None:
    text = str(json_schema())
    assert all(f"'{kind}'" in text for kind in TOWERS)


class TestPlugins:
    @pytest.fixture
    def plugin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        name = "a_plugin_of_the_tests"
        text = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        yield name
        sys.modules.pop(name, None)

    def config(self, plugin: str) -> str:
        Path("c.yaml").write_text(f"plugins: [{plugin}]\nrun_dir: r\ndata: {{path: d}}\ntrainer: {{steps: 1}}\n")
        return "c.yaml"

    def test_one_s_own_file_runs_them(self, plugin: str) -> None:
        assert isinstance(load_config(self.config(plugin)), RetrievalConfig)
        assert Path(f"{plugin}.ran").exists()

    def test_a_stranger_s_file_does_not(self, plugin: str) -> None:
        with pytest.raises(ConfigError, match=rf"plugins: {plugin} is Python code .* \(--plugin {plugin}; "):
            load_config(self.config(plugin), plugins=[])
        assert not Path(f"{plugin}.ran").exists()
        with pytest.raises(ConfigError, match="is Python code"):
            Path("progress.json").touch()  # as in a checkpoint, whichever command reads its configuration
            load_config(self.config(plugin))
        assert not Path(f"{plugin}.ran").exists()
        load_config(self.config(plugin), plugins=[plugin])
        assert Path(f"{plugin}.ran").exists()

    def test_a_stranger_s_file_names_no_other(self, plugin: str) -> None:
        Path("other.yaml").write_text("a secret")
        Path("b.yaml").write_text("base: other.yaml\n")
        with pytest.raises(ConfigError, match=r"^b.yaml:1: base: a checkpoint's configuration names no other file$"):
            load_config("b.yaml", plugins=[])

    @pytest.mark.parametrize("name", ["", ".x", "a..b", "a b"])
    def test_what_is_no_name_of_a_module(self, plugin: str, name: str) -> None:
        Path("d.yaml").write_text(f"plugins: ['{name}']\n")
        with pytest.raises(ConfigError, match=r"d.yaml:1: plugins: expected the name of a module"):
            load_config("d.yaml")

    def test_one_with_a_fault_of_syntax(self, plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
        Path("broken_plugin.py").write_text("def")
        monkeypatch.syspath_prepend(".")
        with pytest.raises(ConfigError, match="plugins: broken_plugin cannot be imported: invalid syntax"):
            load_config(self.config("broken_plugin"))

    def test_one_that_cannot_be_imported(self, plugin: str) -> None:
        with pytest.raises(ConfigError, match=r"c.yaml:1: plugins: no_such_module cannot be imported.*PYTHONPATH"):
            load_config(self.config("no_such_module"))
        with pytest.raises(ConfigError, match="plugins: expected a list"):
            load_config(self.config(plugin), ["plugins=3"])

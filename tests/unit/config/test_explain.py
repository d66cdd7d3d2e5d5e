"""What `gr config explain` says of a key, and that every key has something to be said."""

import pytest

from gr.cli import main
from gr.config.explain import Keys
from gr.config.load import json_schema
from gr.config.run import CALLBACKS
from gr.errors import ConfigError


@pytest.fixture(autouse=True)
def without_plugins(monkeypatch):
    """Callbacks come from plugins alone, which other tests register."""
    monkeypatch.setattr(CALLBACKS, "_configs", {})


@pytest.fixture
def keys(without_plugins):
    return Keys()


def undescribed(schema, at=""):
    """The properties without a description anywhere in a JSON Schema, as Section.key."""
    if isinstance(schema, list):
        return [name for each in schema for name in undescribed(each, at)]
    if not isinstance(schema, dict):
        return []
    at = schema.get("title", at)
    properties = schema.get("properties", {})
    own = [f"{at}.{name}" for name, value in properties.items() if not value.get("description")]
    rest = [value for name, value in schema.items() if name != "properties"]
    return own + undescribed([*properties.values(), *rest], at)


def test_every_property_has_a_description():
    assert undescribed(json_schema()) == []


def test_every_key_is_explained(keys):
    assert len(keys.all) > 130
    for key in keys.all:
        assert all(meaning.description and meaning.type for meaning in keys.explain(key)), key


def test_a_key_of_all_recipes_has_one_meaning(keys):
    [meaning] = keys.explain("trainer.precision")
    assert (meaning.type, meaning.default, meaning.where) == ("fp32 or bf16", "fp32", "")
    assert "autocast" in meaning.description


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("optimizer.lr", "number > 0"),
        ("optimizer.betas", "a list of number >= 0, < 1"),
        ("trainer.steps", "integer > 0 or null"),
        ("trainer.profiler", "a section or null"),
        ("trainer.profiler.start", "integer >= 0"),
        ("planner.tables.item_id", "data_parallel or table_wise or column_wise or row_wise or"),
        ("model.time.scale", "sqrt or log"),
        ("task.tasks.weight", "number > 0"),
        ("task.negatives", "a section of kind per_position, shared, in_batch, full"),
        ("base", "text or a list of text"),
    ],
)
def test_types(keys, key, kind):
    assert all(meaning.type.startswith(kind) for meaning in keys.explain(key))


def test_a_default_that_depends_on_the_kind_is_said_for_each(keys):
    layers = {meaning.where: meaning.default for meaning in keys.explain("model.tower.layers")}
    assert sorted(layers.values()) == ["2", "3"]
    assert all("kind=stu" in where for where, default in layers.items() if default == "3")


def test_a_section_lists_its_keys(keys):
    [trainer] = keys.explain("trainer")
    assert {"steps", "epochs", "global_batch_size", "precision"} <= {each.key for each in trainer.keys}
    assert trainer.default is None
    *_, tower = keys.explain("model.tower")
    assert next(each for each in tower.keys if each.key == "ffn_dim").where == "kind=sasrec"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("trainer.precison", "trainer.precision"),
        ("precision", "trainer.precision"),
        ("data.alpha", "data.stochastic_length.alpha"),
        ("modell", "model"),
    ],
)
def test_a_typing_error_is_answered_with_the_nearest_key(keys, typo, meant):
    with pytest.raises(ConfigError, match=f"^{typo}: no such key; did you mean '{meant}'\\?$"):
        keys.explain(typo)


def test_command(capsys):
    assert main(["config", "explain", "trainer.precision"]) == 0
    assert capsys.readouterr().out == (
        "trainer.precision: bf16 runs the tower under autocast.\n  type     fp32 or bf16\n  default  fp32\n"
    )
    assert main(["config", "explain"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{out}" for name in ("run_dir", "trainer", "data", "model", "task"))
    assert main(["config", "explain", "model.tower"]) == 0
    out = capsys.readouterr().out
    assert out.count("rope_theta") == 1 and "kind stu" in out and "hstu: HSTU, research form" in out
    assert main(["config", "explain", "trainer.precison"]) == 2


def test_help_of_train_names_them(capsys):
    assert main(["train", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(name in out for name in ("gr config show", "gr config explain", "gr config list"))

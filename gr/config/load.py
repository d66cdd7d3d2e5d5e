"""Reads configurations: YAML with `base:` inheritance, then `a.b.c=value` overrides, validated once."""

import importlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema

from gr.config.base import Registry, Section
from gr.config.causal_lm import CausalLMConfig
from gr.config.click import ClickConfig
from gr.config.messages import default_kinds, describe_faults, shortened
from gr.config.preference import PreferenceConfig
from gr.config.ranking import RankingConfig
from gr.config.retrieval import RetrievalConfig
from gr.config.run import RunConfig
from gr.config.sizing import SIZED, retrieval_sizes
from gr.config.towers import TOWERS
from gr.config.yaml import SCALARS, Location, Node, Reader, describe
from gr.errors import ConfigError
from gr.schema import DataSchema

Config = TypeVar("Config", bound=Section)

# task.kind -> the configuration of an experiment and its gr.recipes.base.Recipe.
RECIPES = Registry("task")
RECIPES.add(RetrievalConfig, "gr.recipes.retrieval:RetrievalRecipe", kind="retrieval")
RECIPES.add(PreferenceConfig, "gr.recipes.preference:PreferenceRecipe", kind="preference")
RECIPES.add(RankingConfig, "gr.recipes.ranking:RankingRecipe", kind="ranking")
RECIPES.add(ClickConfig, "gr.recipes.click:ClickRecipe", kind="click")
RECIPES.add(CausalLMConfig, "gr.recipes.causal_lm:CausalLMRecipe", kind="causal_lm")
PROGRESS = "progress.json"  # what lies beside the configuration of a checkpoint, and of nothing else
DEFAULT_RECIPE = "retrieval"
DEFAULT_TOWER = "hstu"
IN_TOWER = "model.tower."
RENAMED_RECIPES = {"generative_ranking": "ranking"}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, plugins: Collection[str] | None = None
) -> RunConfig:
    """The resolved configuration. Raises ConfigError with every fault, each with its origin, path and remedy.

    `task.kind` says which recipe it is for; retrieval where it is unset. `base:` names one file or a list of them,
    relative to the file that says so; later ones win. Sections merge and everything else replaces; a section whose
    `kind` changes starts afresh. Modules under `plugins:` are imported first.

    plugins: the modules that the file may have imported; None: any, for a file that is the caller's own. A file that
    came with a checkpoint is somebody else's: Python code runs only where the caller names it too, and it stands alone:
    `base:` is refused.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}: give a list, [{overrides!r}]")
    if plugins is None and os.path.isfile(Path(path).parent / PROGRESS):  # False for a name that cannot be one
        plugins = ()  # it is a checkpoint's, whoever asks
    bases = plugins is None
    reader = Reader(_default_kinds(RetrievalConfig), bases=bases)
    tree = reader.read(path, overrides)
    if "tables" in tree.value and "trainer" not in tree.value:
        raise ConfigError(f"{path}: an inventory, which names no data and no training: use gr plan {path}")
    if "towers" in tree.value and "budgets" in tree.value:
        raise ConfigError(f"{path}: a grid of experiments: use gr scale {path}")
    _import_plugins(tree.find(("plugins",)), plugins)
    written = tree.find(("task", "kind"))
    kind = DEFAULT_RECIPE if written is None else written.value
    if isinstance(kind, str) and kind in RECIPES:
        if written is not None and kind == "ranking" and tree.find(("model", "bottom")) is not None:
            raise ConfigError(f"{written.origin}: task.kind: ranking of rows by DLRM is now called click")
        if (sizes := _left_to_the_data(tree, kind)) and reader.faults:
            raise _error(path, reader.faults)  # before the data, of which another fault may be told
        overrides = [*_sizes(tree, sizes), *overrides]
        return load_section(RECIPES.config(kind), path, overrides, bases=bases)  # type: ignore[return-value]
    assert written is not None, "the default is registered"
    if isinstance(kind, str) and kind in RENAMED_RECIPES:
        raise ConfigError(f"{written.origin}: task.kind: {kind} is now called {RENAMED_RECIPES[kind]}")
    expected = ", ".join(RECIPES)
    raise ConfigError(f"{written.origin}: task.kind: expected one of {expected}, got {describe(written.plain())}")


def _default_kinds(model: type[Section]) -> dict[Location, str]:
    """The kinds that stand where none is written; of an experiment, that of its task too."""
    of_task = {("task",): DEFAULT_RECIPE} if issubclass(model, RunConfig) else {}
    return default_kinds(model) | of_task


def _left_to_the_data(tree: Node, kind: str) -> list[str]:
    """The keys that `sizes: data` leaves to the data; none where all is set, as in a configuration that was saved."""
    sizes, path = tree.find(("sizes",)), tree.find(("data", "path"))
    if kind not in ("retrieval", "preference") or sizes is None or sizes.value != "data":
        return []
    if path is None or not isinstance(path.value, str):
        return []
    tower = tree.find(("model", "tower", "kind"))
    tower_kind = DEFAULT_TOWER if tower is None else tower.value
    fields = TOWERS.config(tower_kind).model_fields if tower_kind in TOWERS else {}
    keys = [key for key in SIZED if not key.startswith(IN_TOWER) or key.removeprefix(IN_TOWER) in fields]
    unset = [key for key in keys if tree.find(tuple(key.split("."))) is None]
    if kind == "preference":  # which has no negatives, and pairs of neighbouring events
        unset = [key for key in unset if key not in ("task.negatives", "data.event_dropout")]
    if tree.find(("trainer", "steps")) is not None and "trainer.epochs" in unset:
        unset.remove("trainer.epochs")
    return unset


def _sizes(tree: Node, keys: list[str]) -> list[str]:
    """Overrides for keys that are left to the data; raises DataError where there is none."""
    path = tree.find(("data", "path"))
    if not keys or path is None:
        return []
    values = retrieval_sizes(DataSchema.load(path.value))
    return [f"{key}={json.dumps(values[key].value)}" for key in keys]


def _import_plugins(written: Node | None, allowed: Collection[str] | None) -> None:
    """Imports what `plugins:` names. Anything but a list of texts is left for validation to refuse."""
    names = written.plain() if written is not None else None
    if written is None or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return
    for name in names:
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ConfigError(f"{written.origin}: plugins: expected the name of a module, like my.towers, got {name!r}")
        if allowed is not None and name not in allowed:
            raise ConfigError(
                f"{written.origin}: plugins: {name} is Python code that this file asks for: name it too where you "
                f"trust it (--plugin {name}; plugins=[{name!r}] from Python; for gr train, plugins: [{name}] in a "
                "configuration of your own)"
            )
        try:
            importlib.import_module(name)
        except (ImportError, SyntaxError) as error:
            raise ConfigError(
                f"{written.origin}: plugins: {name} cannot be imported: {error}; install it, or name its folder in "
                "PYTHONPATH"
            ) from error


def load_section(
    model: type[Config],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    given: Node | None = None,
    bases: bool = True,
) -> Config:
    """Reads a file whose top level is `model`, by the rules of load_config. given: its content, where it is no YAML.

    bases: whether the file may name others.
    """
    kinds = _default_kinds(model)
    reader = Reader(kinds, bases=bases) if given is None else _Given(kinds, given)
    return _validated(model, path, kinds, reader, reader.read(path, overrides))


def _validated(model: type[Config], path: str | Path, kinds: dict[Location, str], reader: Reader, tree: Node) -> Config:
    faults = reader.faults
    if not reader.broken:
        # Strict JSON reads YAML's types exactly: a list is a tuple, an integer is a number, text is only text.
        try:
            text = json.dumps(_with_kinds(tree.plain(), kinds))
        except ValueError as error:  # an integer in hexadecimal of more digits than Python writes
            raise ConfigError(f"{path}: not a usable number: {error}") from None
        try:
            config = model.model_validate_json(text, strict=True)
        except ValidationError as error:
            faults = faults + describe_faults(model, error.errors(include_url=False), tree)
    if faults:
        raise _error(path, faults)
    return config


class _Given(Reader):
    """Reads one tree that was made elsewhere, and overrides."""

    def __init__(self, default_kinds: Mapping[Location, str], tree: Node) -> None:
        super().__init__(default_kinds)
        self._tree = tree

    def _parse_file(self, path: Path) -> Node:
        return self._tree


def top_level(path: str | Path) -> dict[str, Node]:
    """The keys that a file and its bases set at their top level. Raises ConfigError where one cannot be read."""
    reader = Reader({})
    tree = reader.read(path, ())
    if reader.broken:
        raise _error(path, reader.faults)
    return tree.value


def dump_config(config: RunConfig) -> str:
    """Every field as YAML that `load_config` reads back to an equal configuration."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, width=120)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors.

    Nothing is required, because a base file or an override may supply it; `gr config check` knows the whole.
    """
    models = [(config, "validation") for config in RECIPES.configs()]
    references, schema = models_json_schema(models)  # type: ignore[arg-type]
    schema = _for_editors(schema)
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    for config in RECIPES.configs():
        properties = schema["$defs"][config.__name__]["properties"]
        properties["base"] = {"description": "Files this one starts from, relative to it.", **names}
    alternatives = [references[model, mode] for model, mode in models]  # type: ignore[index]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": alternatives, **schema}


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read back as text, and keeps tuples on one line."""


for _scalar in SCALARS:
    _Dumper.add_implicit_resolver(*_scalar)
_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _with_kinds(tree: Any, kinds: dict[Location, str]) -> Any:
    """Pydantic wants `kind` spelt out in a section that was touched; a user may leave the default unsaid."""
    for location, kind in kinds.items():
        section = tree
        for part in location:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.setdefault("kind", kind)
    return tree


def _for_editors(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_for_editors(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # oneOf would refuse a section without `kind`, which several variants accept.
    renamed = {"anyOf" if key == "oneOf" else key: value for key, value in schema.items()}
    return {key: _for_editors(value) for key, value in renamed.items() if key not in ("required", "discriminator")}


def _error(path: str | Path, faults: list[str]) -> ConfigError:
    if len(faults) == 1:
        return ConfigError(faults[0])
    return ConfigError(f"{len(faults)} faults in the configuration {path}", *shortened(faults))

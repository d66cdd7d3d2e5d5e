"""Reads configurations: YAML with `base:` inheritance, then `a.b.c=value` overrides, validated once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from gr.config.faults import default_kinds, describe_faults
from gr.config.generative import GenerativeConfig
from gr.config.ranking import RankingConfig
from gr.config.section import Section
from gr.config.source import SCALARS, Location, Node, Reader, describe
from gr.config.tree import ExperimentConfig, RunConfig
from gr.errors import ConfigError

Config = TypeVar("Config", bound=Section)

Experiment = ExperimentConfig | RankingConfig | GenerativeConfig
EXPERIMENTS: dict[str, type[ExperimentConfig] | type[RankingConfig] | type[GenerativeConfig]] = {
    "retrieval": ExperimentConfig,
    "ranking": RankingConfig,
    "generative_ranking": GenerativeConfig,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The resolved configuration. Raises ConfigError with every fault, each with its origin, path and remedy.

    `task.kind` says which experiment it is; retrieval where it is unset. `base:` names one file or a list of them,
    relative to the file that says so; later ones win. Sections merge and everything else replaces; a section whose
    `kind` changes starts afresh.
    """
    kinds = default_kinds(ExperimentConfig)
    reader = Reader(kinds)
    tree = reader.read(path, overrides)
    said = tree.find(("task", "kind"))
    if said is None or said.value == "retrieval":
        return _validated(ExperimentConfig, path, kinds, reader, tree)
    if not isinstance(said.value, str) or said.value not in EXPERIMENTS:
        raise ConfigError(
            f"{said.origin}: task.kind: expected one of {', '.join(EXPERIMENTS)}, got {describe(said.plain())}"
        )
    return load_section(EXPERIMENTS[said.value], path, overrides)


def load_section(
    model: type[Config], path: str | Path, overrides: Sequence[str] = (), *, given: Node | None = None
) -> Config:
    """As load_config, for files whose top level is `model`. given: what the file holds, where it is no YAML."""
    kinds = default_kinds(model)
    reader = Reader(kinds) if given is None else _Given(kinds, given)
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
        raise ConfigError(_message(path, faults))
    return config


class _Given(Reader):
    """Reads one tree that was made elsewhere, and overrides."""

    def __init__(self, default_kinds: Mapping[Location, str], tree: Node) -> None:
        super().__init__(default_kinds)
        self._tree = tree

    def _parse_file(self, path: Path) -> Node:
        return self._tree


def top_level(path: str | Path) -> dict[str, Node]:
    """What a file and its bases set at their top level. Raises ConfigError for what cannot be read."""
    reader = Reader({})
    tree = reader.read(path, ())
    if reader.broken:
        raise ConfigError(_message(path, reader.faults))
    return tree.value


def dump_config(config: RunConfig) -> str:
    """Every field as YAML that `load_config` reads back to an equal configuration."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, width=120)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors.

    Nothing is required, because a base file or an override may supply it; `gr config check` knows the whole.
    """
    schema = _for_editors(TypeAdapter(Experiment).json_schema())
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    for model in EXPERIMENTS.values():
        properties = schema["$defs"][model.__name__]["properties"]
        properties["base"] = {"description": "Files this one starts from, relative to it.", **names}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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


def _message(path: str | Path, faults: list[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} faults in the configuration {path}\n  " + "\n  ".join(faults)

"""Reads an experiment's configuration: YAML with `base:` inheritance, then `a.b.c=value` overrides, validated once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gr.config.faults import default_kinds, describe_faults
from gr.config.source import SCALARS, Location, Reader
from gr.config.tree import ExperimentConfig
from gr.errors import ConfigError

_DEFAULT_KINDS = default_kinds(ExperimentConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The resolved configuration. Raises ConfigError with every fault, each with its origin, path and remedy.

    `base:` names one file or a list of them, relative to the file that says so; later ones win. Sections merge and
    everything else replaces; a section whose `kind` changes starts afresh.
    """
    reader = Reader(_DEFAULT_KINDS)
    tree = reader.read(path, overrides)
    faults = reader.faults
    if not reader.broken:
        # Strict JSON reads YAML's types exactly: a list is a tuple, an integer is a number, text is only text.
        text = json.dumps(_with_kinds(tree.plain(), _DEFAULT_KINDS))
        try:
            config = ExperimentConfig.model_validate_json(text, strict=True)
        except ValidationError as error:
            faults = faults + describe_faults(ExperimentConfig, error.errors(include_url=False), tree)
    if faults:
        raise ConfigError(_message(path, faults))
    return config


def dump_config(config: ExperimentConfig) -> str:
    """Every field as YAML that `load_config` reads back to an equal configuration."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, width=120)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors.

    Nothing is required, because a base file or an override may supply it; `gr config check` knows the whole.
    """
    schema = _for_editors(ExperimentConfig.model_json_schema())
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["base"] = {"description": "Files this one starts from, relative to it.", **names}
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

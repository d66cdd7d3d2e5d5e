"""The meaning of keys, from the JSON Schema of the configuration: `trainer.precision` -> type, default, allowed values.

A key may mean several things: it belongs to several recipes (task.kind), or to several variants of a section (`kind`).
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gr.config.load import json_schema
from gr.errors import ConfigError

_BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
    "multipleOf": "multiple of",
}
_TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
_LARGEST_SHOWN = 10**9  # limits beyond it only keep sums exact


@dataclass(frozen=True)
class Meaning:
    """One meaning of a key. where: the kinds of which it is so; empty where it is so of all that have the key.

    default: None where a value has to be given. keys: the meanings of a section's own keys.
    """

    key: str
    where: str
    description: str
    type: str
    default: str | None
    keys: tuple["Meaning", ...] = ()


@dataclass(frozen=True)
class _Place:
    """A property of the schema, and the kinds that were chosen on the way to it."""

    schema: dict[str, Any]
    where: tuple[str, ...]


class Keys:
    """Every key of a configuration file."""

    def __init__(self) -> None:
        self._schema = json_schema()

    def explain(self, key: str) -> list[Meaning]:
        """The meanings of a key. Raises ConfigError, naming the nearest key, where there is none."""
        places = self._find(key)
        if not places:
            last = key.rsplit(".", 1)[-1]
            near = difflib.get_close_matches(
                key, [each for each in self.all if each.rsplit(".", 1)[-1] == last], 1, 0.0
            )
            near = near or difflib.get_close_matches(key, self.all, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"keys: {', '.join(self.top)}"
            raise ConfigError(f"{key}: no such key; {hint}")
        above = self._find(key.rpartition(".")[0])
        return _merged([self._meaning(key, place) for place in places], sum(map(self._sections, above)))

    @property
    def top(self) -> list[str]:
        """The keys of the top level."""
        return self._names(self._find(""))

    @cached_property
    def all(self) -> list[str]:
        """All, as a.b.c; without those below a table's name."""
        names, todo = [], [""]
        while todo:
            at = todo.pop()
            below = [f"{at}.{name}" if at else name for name in self._names(self._find(at))]
            names += below
            todo += below
        return sorted(names)

    def _find(self, key: str) -> list[_Place]:
        places = [_Place(variant, (f"task.kind={kind}",)) for kind, variant in self._recipes()]
        for part in key.split(".") if key else ():
            places = [below for place in places for below in self._below(place, part)]
        return places

    def _recipes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for variant in self._variants(self._schema):
            yield self._kind(self._resolved(variant["properties"]["task"])) or "", variant

    def _below(self, place: _Place, name: str) -> Iterator[_Place]:
        variants = self._variants(place.schema)
        for variant in variants:
            kind = self._kind(variant) if len(variants) > 1 else None
            where = (*place.where, f"kind={kind}") if kind and name != "kind" else place.where
            if name in variant.get("properties", {}):
                yield _Place(variant["properties"][name], where)
            elif isinstance(variant.get("additionalProperties"), dict):
                yield _Place(
                    {"description": place.schema.get("description", ""), **variant["additionalProperties"]}, where
                )

    def _sections(self, place: _Place) -> int:
        return sum("properties" in each or "additionalProperties" in each for each in self._variants(place.schema))

    def _names(self, places: list[_Place]) -> list[str]:
        variants = (variant for place in places for variant in self._variants(place.schema))
        return list(dict.fromkeys(name for variant in variants for name in variant.get("properties", {})))

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            return self._schema["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
        return schema

    def _variants(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The alternatives of a value; those of a list are of its items."""
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return [variant for each in schema["anyOf"] for variant in self._variants(each)]
        return self._variants(schema["items"]) if isinstance(schema.get("items"), dict) else [schema]

    def _kind(self, schema: dict[str, Any]) -> str | None:
        return schema.get("properties", {}).get("kind", {}).get("const")

    def _meaning(self, key: str, place: _Place) -> Meaning:
        schema, inside, sections = place.schema, _Place(place.schema, ()), self._sections(place)
        keys = [
            meaning
            for name in self._names([place])
            for meaning in _merged([self._meaning(name, each) for each in self._below(inside, name)], sections)
        ]
        default = _default(schema["default"]) if "default" in schema else None
        description = schema.get("description") or self._resolved(schema).get("description", "")
        where = ", ".join(place.where)
        return Meaning(key, where, " ".join(description.split()), self._type(schema), default, tuple(keys))

    def _type(self, schema: dict[str, Any]) -> str:
        schema = self._resolved(schema)
        if "anyOf" in schema:
            kinds = [kind for each in self._variants(schema) if (kind := self._kind(each))]
            plain = [self._type(each) for each in schema["anyOf"] if "properties" not in self._resolved(each)]
            section = [f"a section of kind {', '.join(kinds)}"] if kinds else []
            section = section or ["a section"] * any("properties" in each for each in self._variants(schema))
            return " or ".join(dict.fromkeys([*section, *plain]))
        if "const" in schema or "enum" in schema:
            return " or ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
        if schema.get("type") == "array":
            items = schema["prefixItems"] if "prefixItems" in schema else [schema.get("items", {})]
            return f"a list of {' and '.join(dict.fromkeys(self._type(each) for each in items))}"
        if schema.get("type") == "object":
            inside = schema.get("additionalProperties")
            return f"a section of NAME: {self._type(inside)}" if isinstance(inside, dict) else "a section"
        bounds = [
            f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if abs(schema.get(key, 1e99)) < _LARGEST_SHOWN
        ]
        return " ".join([_TYPES[schema["type"]], ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if value and isinstance(value, dict):
        return f"kind {value['kind']}" if "kind" in value else "as its keys say"
    return value if isinstance(value, str) else json.dumps(value)


def _merged(meanings: list[Meaning], sections: int) -> list[Meaning]:
    """Meanings that differ in nothing but where they are so, as one. sections: those that might have the key."""
    groups: dict[Meaning, list[str]] = {}
    for each in meanings:
        groups.setdefault(replace(each, where=""), []).append(each.where)
    merged = [replace(each, where=" or ".join(dict.fromkeys(where))) for each, where in groups.items()]
    if len(meanings) == sections and len({each.where for each in merged}) == 1:
        return list(groups)
    return merged

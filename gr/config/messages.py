"""Turns pydantic's findings into lines a user can act on: where it is written, which key, what is allowed."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gr.config.base import Registry, Section
from gr.config.yaml import Location, Node, describe
from gr.errors import nearest

FAULTS_SHOWN = 20
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list, like [a, b]",
    "tuple": "a list, like [a, b]",
    "dict": "a section of `key: value` lines",
    "model": "a section of `key: value` lines",
}


def shortened(faults: list[str]) -> list[str]:
    """The first FAULTS_SHOWN, and the number of the others."""
    more = len(faults) - FAULTS_SHOWN
    return [*faults[:FAULTS_SHOWN], f"and {more} faults more"] if more > 0 else faults


def describe_faults(model: type[BaseModel], findings: list[ErrorDetails], tree: Node) -> list[str]:
    """One line a fault, ordered as pydantic found them; of many the first ones, and a line with the others' number."""
    if any(finding["type"] == "json_invalid" for finding in findings):  # what was read is JSON; pydantic's has a depth
        return [f"{tree.origin}: nested too deep; values are numbers, texts, and lists and sections of them"]
    grouped: dict[Location, list[ErrorDetails]] = {}
    for finding in findings:
        # A union of plain types yields one finding for each member; they are one fault at one place.
        grouped.setdefault(_path(model, finding), []).append(finding)
    return [
        f"{_origin(tree, path, findings[0])}: {_dotted(path)}{_problem(model, path, findings)}"
        for path, findings in grouped.items()
    ]


def default_kinds(model: type[BaseModel], at: Location = ()) -> dict[Location, str]:
    """The sections under `model` that choose a variant by `kind`, and the kind that stands where none is written."""
    kinds: dict[Location, str] = {}
    for name, field in model.model_fields.items():
        members = _models(field.annotation)
        if field.discriminator is not None or len(members) > 1 or _registry(field):
            if isinstance(field.default, Section):
                kinds[*at, name] = field.default.kind  # type: ignore[attr-defined]
        elif members:
            kinds |= default_kinds(members[0], (*at, name))
    return kinds


def _path(model: type[BaseModel], finding: ErrorDetails) -> Location:
    """The path that the user wrote. Pydantic adds the chosen member of a union to its location; that is no key."""
    path = tuple(part for part, is_key, _ in _walk(model, finding["loc"]) if is_key)
    if finding["type"] == "extra_forbidden":
        return (*path, finding["loc"][-1])
    return (*path, "kind") if finding["type"] == "union_tag_invalid" else path


def _walk(model: type[BaseModel], location: Location) -> Iterator[tuple[str | int, bool, list[Any]]]:
    """Follow a location of pydantic's: each part, whether it is a key of the user's, and the types allowed there."""
    types: list[Any] = [model]
    for part in location:
        inside = [member for kind in types for member in _children(kind, part)]
        types = inside or [kind for kind in types if _is_kind(kind, part)] or types
        yield part, bool(inside), types


def _children(kind: Any, part: str | int) -> list[Any]:
    """The types allowed at key or index `part` of a value of type `kind`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        if field is None:
            return []
        registry = _registry(field)
        return list(registry.configs()) if registry else _members(field.annotation)
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return _members(arguments[1])
    if get_origin(kind) in (list, tuple) and isinstance(part, int):
        item = arguments[0] if Ellipsis in arguments or get_origin(kind) is list else arguments[part]
        return _members(item)
    return []


def _members(kind: Any) -> list[Any]:
    """A type without Annotated and Union: its alternatives."""
    origin = get_origin(kind)
    if origin is Annotated:
        registries = [each for each in get_args(kind)[1:] if isinstance(each, Registry)]
        return list(registries[0].configs()) if registries else _members(get_args(kind)[0])
    if origin in (None, Literal, dict, list, tuple):
        return [kind]
    return [member for argument in get_args(kind) for member in _members(argument)]


def _registry(field: FieldInfo) -> Registry | None:
    """The registry whose kinds the field takes."""
    return next((each for each in field.metadata if isinstance(each, Registry)), None)


def _models(kind: Any) -> list[type[BaseModel]]:
    return [member for member in _members(kind) if isinstance(member, type) and issubclass(member, BaseModel)]


def _is_kind(kind: Any, tag: str | int) -> bool:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel) and "kind" in kind.model_fields):
        return False
    return tag in get_args(kind.model_fields["kind"].annotation)


def _origin(tree: Node, path: Location, finding: ErrorDetails) -> str:
    """The places to look at. A rule between several keys names them in its message: each of their places is listed."""
    if finding["type"] != "value_error":
        return tree.origin_of(path)
    named = [tree.find((*path, *name.split("."))) for name in re.findall(r"\w+(?:\.\w+)*", finding["msg"])]
    written = [node.origin for node in named if node and not isinstance(node.value, dict)]
    return ", ".join(dict.fromkeys(written)) or tree.origin_of(path)


def _dotted(path: Location) -> str:
    return f"{'.'.join(map(str, path))}: " if path else ""


def _problem(model: type[BaseModel], path: Location, findings: list[ErrorDetails]) -> str:
    finding = findings[0]
    kind, value = finding["type"], finding["input"]
    if kind == "extra_forbidden":
        sections = [each for each in _types_at(model, finding["loc"][:-1]) if each is not type(None)]
        renamed = {old: new for section in sections for old, new in getattr(section, "renamed", {}).items()}
        if str(path[-1]) in renamed:
            return f"is now called {renamed[str(path[-1])]}"
        keys = sorted({name for section in sections for name in section.model_fields})
        return f"unknown key; {_nearest(str(path[-1]), keys, 'known')}"
    if kind == "union_tag_not_found":
        return "kind is missing"
    if kind == "missing":
        return "required, but not set"
    if kind == "value_error":
        return str(finding["msg"]).removeprefix("Value error, ")
    if kind == "union_tag_invalid":
        parents = _types_at(model, finding["loc"][:-1]) if len(finding["loc"]) > 1 else [model]
        now = {old: new for section in parents for old, new in getattr(section, "renamed", {}).items()}
        if (choice := f"{path[-2]}.kind={value['kind']}") in now:
            return f"kind {value['kind']} is now written {now[choice]}"
        tags = [str(tag).strip("'") for tag in str(finding["ctx"]["expected_tags"]).split(", ")]
        return f"unknown kind {describe(value['kind'])}; {_nearest(str(value['kind']), tags, 'allowed')}"
    if all(each["type"] == "literal_error" for each in findings):
        options = [str(option) for member in _types_at(model, finding["loc"]) for option in get_args(member)]
        return f"{describe(value)} is not allowed; {_nearest(str(value), options, 'allowed')}"
    if kind in ("too_long", "too_short"):
        return f"expected {finding['ctx'].get('max_length', finding['ctx'].get('min_length'))} items, got {len(value)}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"expected an integer, got {value}; write {int(value)}"
    word = "model" if kind.startswith("model_") else kind.removesuffix("_type").removesuffix("_from_float")
    if word in _EXPECTED:
        return f"expected {' or '.join(_alternatives(findings, word))}, got {describe(value)}"
    message = str(finding["msg"]).removeprefix("Input ")
    return f"{message}, got {describe(value)}"


def _alternatives(findings: list[ErrorDetails], first: str) -> list[str]:
    words = [first] + [str(each["type"]).removesuffix("_type") for each in findings[1:]]
    return list(dict.fromkeys(_EXPECTED[word] for word in words if word in _EXPECTED))


def _types_at(model: type[BaseModel], location: Location) -> list[Any]:
    types: list[Any] = [model]
    for _, _, types in _walk(model, location):  # noqa: B007 - the types at the last part are the ones wanted
        pass
    return types


def _nearest(word: str, known: list[str], label: str) -> str:
    if known in ([], [""]):
        return "none is registered: name the module that has it under plugins"
    return nearest(word, known, label)

"""The elements of a configuration: sections, limits of numbers, and registries of kinds."""

import importlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from gr.errors import ConfigError

# Numbers far above any model, below which sums and products of a plan are exact or at least finite.
LARGEST = 2**53
Count = Annotated[int, Field(gt=0, le=LARGEST)]
CountOrNone = Annotated[int, Field(ge=0, le=LARGEST)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Precision = Literal["fp32", "bf16"]


def _checked_path(text: str) -> str:
    if not text:
        raise ValueError("empty; . is the working folder")
    if text.startswith("~"):
        raise ValueError(f"~ is not filled in here, and nodes may differ in it: write the whole path, not {text}")
    if "\0" in text:
        raise ValueError(f"{text!r} is no path")
    return text


PathText = Annotated[str, AfterValidator(_checked_path)]  # of a file or folder


def import_target(target: str) -> Any:
    """The object "module:name", imported now."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class Section(BaseModel):
    """A frozen and closed part of a configuration: an unknown key is an error.

    renamed: what users wrote in earlier releases, a key or `key.kind=value` -> what to write now; the error for the old
    one says the new one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[dict[str, str]] = {}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema of the section; its `kind`, which says what it is, is described as the section is."""
        described = handler(schema)
        section = handler.resolve_ref_schema(described)
        if "kind" in section.get("properties", {}):
            section["properties"]["kind"].setdefault("description", section.get("description", ""))
        return described


class Registry:
    """The kinds of one part of a configuration: kind -> its config class and what it configures, "module:name".

    `Annotated[Base, registry]` is the type of a field that takes any registered kind, chosen by the key `kind`. The
    table may grow while a program runs: a module named under `plugins:` adds its own kinds when it is imported.
    """

    def __init__(self, what: str) -> None:
        """what: the noun for messages."""
        self.what = what
        self._configs: dict[str, type[Section]] = {}
        self._targets: dict[str, str] = {}

    def add(self, config: type[Section], target: str, *, kind: str | None = None) -> None:
        """Registers `config` and the "module:name" of what it configures. kind: unset, that of config's field `kind`.

        Raises ConfigError where there is no kind, or it is another class's already.
        """
        kind = kind or next(iter(get_args(config.model_fields["kind"].annotation)), None)
        if kind is None:
            raise ConfigError(f"{config.__module__}.{config.__qualname__}: declare kind: Literal['name'] = 'name'")
        other = self._configs.get(kind)
        if other is not None and (other.__module__, other.__qualname__) != (config.__module__, config.__qualname__):
            raise ConfigError(
                f"{config.__module__}.{config.__qualname__}: {self.what} '{kind}' is already "
                f"{other.__module__}.{other.__qualname__}; choose another kind"
            )
        self._configs[kind], self._targets[kind] = config, target

    def remove(self, kind: str) -> None:
        """Takes a kind out again, as tests do with their own."""
        del self._configs[kind], self._targets[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __contains__(self, kind: object) -> bool:
        return kind in self._configs

    def config(self, kind: str) -> type[Section]:
        """The config class of a registered kind."""
        return self._configs[kind]

    def configs(self) -> list[type[Section]]:
        """Every registered config class, in the order of registration."""
        return list(self._configs.values())

    def kind_of(self, config: Section) -> str:
        """The kind that `config` is an instance of. Raises ConfigError for a class that is not registered."""
        for kind, known in self._configs.items():
            if type(config) is known:
                return kind
        raise ConfigError(
            f"{type(config).__module__}.{type(config).__qualname__} is no registered {self.what}; known: "
            f"{', '.join(self)}"
        )

    def target(self, config: Section) -> Any:
        """The object that `config` configures, imported now. Raises ConfigError where it cannot be found."""
        return self.target_of(self.kind_of(config))

    def target_of(self, kind: str) -> Any:
        """The object that a registered kind configures, imported now. Raises ConfigError where it cannot be found."""
        module, _, name = self._targets[kind].partition(":")
        try:
            return import_target(self._targets[kind])
        except AttributeError:
            raise ConfigError(f"{self.what} '{kind}': module {module} has no {name}") from None

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Section:
        if isinstance(value, Section):
            self.kind_of(value)
            return value
        if not isinstance(value, dict):
            raise PydanticKnownError("model_attributes_type")
        if "kind" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        kind = value["kind"]
        if not isinstance(kind, str) or kind not in self:
            known = ", ".join(f"'{name}'" for name in self)
            tags = {"discriminator": "'kind'", "tag": str(kind), "expected_tags": known}
            raise PydanticKnownError("union_tag_invalid", tags)
        config = self._configs[kind]
        try:
            if info.mode == "json":  # strict, as the file around it is read
                return config.model_validate_json(json.dumps(value), strict=True)
            return config.model_validate(value)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                error.title, [_below(kind, each) for each in error.errors()]
            ) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        described = [
            config.__get_pydantic_json_schema__(config.__pydantic_core_schema__, handler) for config in self.configs()
        ]
        return {"anyOf": described}


def _below(kind: str, error: Any) -> InitErrorDetails:
    """`error` of a section as one of the field that holds it; the kind comes first, as in pydantic's own unions."""
    type_: Any = error["type"]
    if type_ == "value_error":
        # Pydantic would format the message again; this keeps it as it is.
        type_ = PydanticCustomError("value_error", "{message}", {"message": error["msg"]})
    details: InitErrorDetails = {"type": type_, "loc": (kind, *error["loc"]), "input": error["input"]}
    if "ctx" in error and error["type"] != "value_error":
        details["ctx"] = error["ctx"]
    return details

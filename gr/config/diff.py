"""The differences of two configurations."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from gr.config.run import RunConfig

_ABSENT = object()


def differences(left: RunConfig, right: RunConfig) -> dict[str, tuple[str, str]]:
    """Both values, as JSON, of every path where the two differ."""
    a, b = dict(_leaves(left)), dict(_leaves(right))
    return {
        path: (_shown(a.get(path, _ABSENT)), _shown(b.get(path, _ABSENT)))
        for path in {**a, **b}
        if a.get(path, _ABSENT) != b.get(path, _ABSENT)
    }


def _leaves(section: BaseModel | dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items() if isinstance(section, dict) else section:
        if isinstance(value, BaseModel | dict) and value != {}:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    # default: for sections in a tuple, such as the callbacks of plugins.
    return "(absent)" if value is _ABSENT else json.dumps(value, default=BaseModel.model_dump)

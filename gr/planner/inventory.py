"""Inventories, read from YAML or from a bare list of tables."""

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gr.config.inventory import InventoryConfig, TableConfig
from gr.config.load import RECIPES, load_section, top_level
from gr.config.messages import describe_faults, shortened
from gr.config.yaml import Node
from gr.errors import ConfigError, nearest
from gr.files import parse_json

LISTS = (".json", ".parquet")


def is_inventory(path: str | Path) -> bool:
    """True where the file describes tables, False where it describes an experiment.

    Raises ConfigError when it cannot be read, or has neither `tables` nor its like among an experiment's keys.
    """
    if Path(path).suffix in LISTS:
        return True
    if Path(path).suffix in (".csv", ".tsv"):
        raise ConfigError(
            f"{path}: a list of tables is .parquet (a row a table) or .json (a list of objects): write one "
            "with the same columns, for example by pandas.read_csv(...).to_parquet(...)"
        )
    keys = top_level(path)
    if "tables" in keys:
        return True
    known = {name for recipe in RECIPES.configs() for name in recipe.model_fields}
    if near := difflib.get_close_matches("tables", sorted(set(keys) - known), n=1, cutoff=0.8):
        raise ConfigError(f"{keys[near[0]].origin}: {near[0]}: unknown key; did you mean 'tables', of an inventory?")
    return False


def load_inventory(path: str | Path, overrides: Sequence[str] = ()) -> InventoryConfig:
    """An InventoryConfig in YAML; or its tables alone, as .json (a list of objects) or .parquet (a row a table).

    Objects and columns are named as the fields of TableConfig, and null is a field's default; the batch and all else
    then come from overrides. Raises ConfigError with every fault and the file's line or row.
    """
    path = Path(path)
    try:
        return _load(path, overrides)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep; a table has numbers, texts and lists of them") from None


def _load(path: Path, overrides: Sequence[str]) -> InventoryConfig:
    rows: list[Any]
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix == ".json":
        content = _json(path)
        if isinstance(content, dict):  # an inventory, and JSON is YAML
            return load_section(InventoryConfig, path, overrides)
        if not isinstance(content, list):
            raise ConfigError(f'{path}: expected a list of tables, like [{{"name": ..., "rows": ..., "dim": ...}}]')
        rows = content
    else:
        return load_section(InventoryConfig, path, overrides)
    if not rows:
        raise ConfigError(f"{path}: holds no tables; write one a row, with name, rows and dim")
    tree = Node({"tables": Node(_checked_rows(path, rows), str(path))}, str(path))
    return load_section(InventoryConfig, path, overrides, given=tree)


def _json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise ConfigError(f"{path}: {word} is not a finite number")

    try:
        return parse_json(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path}: not a Parquet file: {error}") from None
    known = TableConfig.model_fields
    for name in table.column_names:
        if name not in known:
            raise ConfigError(f"{path}: unknown column '{name}'; {nearest(name, known, 'known')}")
    if absent := [name for name, field in known.items() if field.is_required() and name not in table.column_names]:
        raise ConfigError(f"{path}: no column {', '.join(absent)}; columns: {', '.join(table.column_names) or 'none'}")
    return [{name: _whole(value) for name, value in row.items()} for row in table.to_pylist()]


def _whole(value: Any) -> Any:
    """`value` as an integer where it is a whole float: pandas writes an integer column with gaps as floats."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


def _checked_rows(path: Path, rows: list[Any]) -> list[Node]:
    """Every row as a Node without nulls, whose origin is its number from 1. Raises ConfigError with every fault."""
    nodes: list[Node] = []
    faults: list[str] = []
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        origin = f"{path} row {number}"
        if not isinstance(row, dict):
            faults.append(f'{origin}: expected a table like {{"name": ..., "rows": ..., "dim": ...}}, got {row!r:.60}')
            continue
        plain = {key: value for key, value in row.items() if value is not None}
        node = Node({key: _node(value, origin) for key, value in plain.items()}, origin)
        nodes.append(node)
        try:
            table = TableConfig.model_validate_json(json.dumps(plain, allow_nan=False), strict=True)
        except ValidationError as error:
            faults += describe_faults(TableConfig, error.errors(include_url=False), node)
        except (TypeError, ValueError):  # json has no bytes, dates, decimals and infinities
            odd = next(key for key, value in plain.items() if not _is_plain(value))
            faults.append(f"{origin}: {odd}: expected text, a finite number or a list, got {plain[odd]!r:.60}")
        else:
            if (before := first.setdefault(table.name, number)) != number:
                faults.append(f"{origin}: name: '{table.name}' is also the table of row {before}; names are unique")
    if faults:
        raise ConfigError(*shortened(faults))
    return nodes


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int)


def _node(value: Any, origin: str) -> Node:
    return Node([_node(item, origin) for item in value] if isinstance(value, list) else value, origin)

"""Inventories: read from YAML or from a bare list of tables, or derived from an experiment."""

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from gr.config.faults import describe_faults
from gr.config.generative import GenerativeConfig, GenerativeModelConfig, InterleavedInput
from gr.config.inventory import (
    ROW_MULTIPLE,
    DLRMDense,
    HSTUDense,
    InventoryConfig,
    LossInventory,
    TableConfig,
    TransformerDense,
    stored_dim,
)
from gr.config.load import EXPERIMENTS, load_section, top_level
from gr.config.ranking import RankingConfig
from gr.config.source import Node, describe
from gr.config.stu import STUConfig
from gr.config.tree import (
    ExperimentConfig,
    FullSoftmax,
    HSTUConfig,
    InBatchNegatives,
    ModelConfig,
    PerPositionNegatives,
    RunConfig,
    SharedNegatives,
)
from gr.errors import ConfigError
from gr.schema import DataSchema, TabularSchema

LISTS = (".json", ".parquet")
ITEM_TABLE = "item_id"
FAULTS_SHOWN = 20
# As gr.tasks.negatives and gr.ops.linear_cross_entropy have them, which import torch.
SMALL_CORPUS = 1 << 16
LOSS_CHUNK = 1024


def is_inventory(path: str | Path) -> bool:
    """Whether the file describes tables, as opposed to an experiment.

    Raises ConfigError when it cannot be read, or has neither `tables` nor its like among an experiment's keys.
    """
    if Path(path).suffix in LISTS:
        return True
    keys = top_level(path)
    if "tables" in keys:
        return True
    known = {name for experiment in EXPERIMENTS.values() for name in experiment.model_fields}
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
    given = Node({"tables": Node(_checked_rows(path, rows), str(path))}, str(path))
    return load_section(InventoryConfig, path, overrides, given=given)


def _json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise ConfigError(f"{path}: {word} is not a finite number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigError(f"{path}: not a usable number: {error}") from None


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
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ConfigError(f"{path}: unknown column '{name}'; {hint}(known: {', '.join(known)})")
    if absent := [name for name, field in known.items() if field.is_required() and name not in table.column_names]:
        raise ConfigError(f"{path}: no column {', '.join(absent)}; columns: {', '.join(table.column_names) or 'none'}")
    return [{name: _whole(value) for name, value in row.items()} for row in table.to_pylist()]


def _whole(value: Any) -> Any:
    """Pandas writes an integer column with gaps as floats."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


def _checked_rows(path: Path, rows: list[Any]) -> list[Node]:
    """Every row as a Node whose origin is its number, from 1, without nulls. Raises ConfigError with every fault."""
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
        except (TypeError, ValueError):  # of json: bytes, dates, decimals, infinities
            odd = next(key for key, value in plain.items() if not _is_plain(value))
            faults.append(f"{origin}: {odd}: expected text, a finite number or a list, got {plain[odd]!r:.60}")
        else:
            if (before := first.setdefault(table.name, number)) != number:
                faults.append(f"{origin}: name: '{table.name}' is also the table of row {before}; names are unique")
    if len(faults) > FAULTS_SHOWN:
        faults[FAULTS_SHOWN:] = [f"and {len(faults) - FAULTS_SHOWN} faults more"]
    if faults:
        raise ConfigError("\n  ".join(faults))
    return nodes


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int)


def _node(value: Any, origin: str) -> Node:
    return Node([_node(item, origin) for item in value] if isinstance(value, list) else value, origin)


@contextmanager
def _within_limits() -> Iterator[None]:
    """An experiment's sizes may be beyond what the planner counts. Raises ConfigError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"the planner cannot count this experiment: {where}: {first['msg'].lower()}, got {describe(first['input'])}"
        ) from None


@_within_limits()
def experiment_inventory(
    config: ExperimentConfig, item_rows: int, *, mean_length: float | None = None
) -> InventoryConfig:
    """What an experiment trains: its item table of `item_rows` rows, its tower, its loss.

    mean_length: tokens of a mean example; unset: data.max_length, the most there can be. Negatives of each position
    from a large corpus count as drawn, though the sampler looks each distinct one up once.
    """
    N = config.data.max_length
    length = float(N) if mean_length is None else mean_length
    corpus = item_rows - 1  # row 0 is padding
    loss, ids_per_example, ids_per_step = _candidates(config, corpus, length)
    table = TableConfig(
        name=ITEM_TABLE,
        rows=item_rows,
        dim=stored_dim(config.model.dim),
        dtype=config.embeddings.dtype,
        kind="sequence",
        features=2,  # the history and the candidates
        ids_per_example=length + ids_per_example,
        ids_per_step=ids_per_step,
        optimizer=config.embeddings.optimizer.kind,
    )
    return InventoryConfig(
        name=config.task.kind,
        global_batch_size=config.trainer.global_batch_size,
        precision=config.trainer.precision,
        dense_optimizer=_dense_optimizer(config),
        tables=(table,),
        dense=_tower(config.model, length, N, other_parameters=N * config.model.dim),
        loss=loss,
    )


@_within_limits()
def generative_inventory(config: GenerativeConfig, schema: DataSchema) -> InventoryConfig:
    """What a generative ranking experiment trains: a table for each feature, its tower, its loss.

    Every example counts as data.max_length events, the most there can be.
    """
    model, task, N = config.model, config.task, config.data.max_length
    contextual = len(schema.contextual) + len(schema.contextual_numeric)
    interleaved = isinstance(model.input, InterleavedInput)
    tokens = contextual + N * (2 if interleaved else 1)
    reads = {ITEM_TABLE: (schema.item_cardinality, N)}
    reads |= {name: (rows, N) for name, rows in schema.event_features.items()}
    reads |= {name: (rows, 1) for name, rows in schema.contextual.items()}
    tables = tuple(
        TableConfig(
            name=name,
            rows=rows,
            dim=stored_dim(model.dim),
            dtype=config.embeddings.dtype,
            kind="sequence",
            ids_per_example=ids,
            optimizer=config.embeddings.optimizer.kind,
        )
        for name, (rows, ids) in reads.items()
    )
    # Positions, buckets of time, actions with their offset, `no action`, slopes and offsets of numbers, a norm.
    vectors = N + 1 + contextual + (model.time.buckets if model.time else 0) + len(schema.actions) + 1
    vectors += (not interleaved) + 2 * len(schema.contextual_numeric) + 2
    widths = [model.dim, *model.head, len(task.tasks)]
    head = sum((into + 1) * out for into, out in pairwise(widths))
    predicted = config.data.candidates if task.supervision == "candidates" and config.data.stream is None else N
    return InventoryConfig(
        name=task.kind,
        global_batch_size=config.trainer.global_batch_size,
        precision=config.trainer.precision,
        dense_optimizer=_dense_optimizer(config),
        tables=tables,
        dense=_tower(model, float(tokens), tokens, other_parameters=vectors * model.dim + head),
        loss=LossInventory(scores_per_example=predicted * len(task.tasks)),
    )


@_within_limits()
def ranking_inventory(config: RankingConfig, schema: TabularSchema) -> InventoryConfig:
    """What a ranking experiment trains: a table for each sparse column, and DLRM's dense part."""
    model, interaction = config.model, config.model.interaction
    details = interaction.model_dump(exclude={"kind"})
    names = {"layers": "dcn_layers", "rank": "dcn_rank"}
    tables = tuple(
        TableConfig(
            name=column.name,
            rows=column.cardinality,
            dim=model.dim + (ROW_MULTIPLE if model.row_weights else 0),
            dtype=config.embeddings.dtype,
            kind="sequence" if model.row_weights else "pooled",
            ids_per_example=column.hots,
            optimizer=config.embeddings.optimizer.kind,
        )
        for column in schema.sparse
    )
    return InventoryConfig(
        name=config.task.kind,
        global_batch_size=config.trainer.global_batch_size,
        precision=config.trainer.precision,
        dense_optimizer=_dense_optimizer(config),
        tables=tables,
        dense=DLRMDense(
            dense_features=len(schema.dense),
            dim=model.dim,
            bottom=model.bottom,
            top=model.top,
            interaction=interaction.kind,
            **{names.get(name, name): value for name, value in details.items()},
        ),
        loss=LossInventory(scores_per_example=1),
    )


def _dense_optimizer(config: RunConfig) -> Literal["adam", "sgd", "adagrad"]:
    return "adam" if config.optimizer.kind == "adamw" else config.optimizer.kind


def _candidates(config: ExperimentConfig, corpus: int, length: float) -> tuple[LossInventory, float, float]:
    """The loss, and the candidates it looks up: an example, and a step on each rank whatever its batch."""
    match config.task.negatives:
        case FullSoftmax():
            return LossInventory(scores_per_example=length * corpus, tokens_at_once=LOSS_CHUNK), 0.0, corpus
        case InBatchNegatives():
            targets = min(config.trainer.global_batch_size * length, corpus)
            return LossInventory(scores_per_example=length * targets, tokens_at_once=LOSS_CHUNK), 0.0, targets
        case PerPositionNegatives(count=count):
            loss = LossInventory(scores_per_example=length * (1 + count))
            return (loss, 0.0, corpus) if corpus <= SMALL_CORPUS else (loss, length * (1 + count), 0.0)
        case SharedNegatives(count=count):
            return LossInventory(scores_per_example=length * (1 + count)), length, count


def _tower(
    model: ModelConfig | GenerativeModelConfig, length: float, N: int, *, other_parameters: int
) -> HSTUDense | TransformerDense:
    """The layers as gr/towers has them. other_parameters: what the model trains beside them."""
    tower, D = model.tower, model.dim
    if isinstance(tower, HSTUConfig | STUConfig):
        if isinstance(tower, HSTUConfig):
            concat_ua, recompute = tower.concat_ua, False
            others = (2 * N - 1 if tower.position_bias else 0) + (tower.time_buckets + 1 if tower.time_bias else 0)
        else:
            concat_ua, recompute = True, True
            HQ, HV = tower.heads * tower.qk_dim, tower.heads * tower.v_dim
            norms = 2 * D + 2 * (tower.heads if tower.group_norm else HV)
            # W_o has no bias, which HSTUDense counts; U V Q K have one.
            others = 2 * HQ + 2 * HV + norms - D
        return HSTUDense(
            layers=tower.layers,
            dim=D,
            heads=tower.heads,
            qk_dim=tower.qk_dim,
            v_dim=tower.v_dim,
            mean_length=length,
            max_length=N,
            concat_ua=concat_ua,
            recompute=recompute,
            other_parameters=other_parameters + tower.layers * others,
        )
    # SASRec: biases of q, k and v, of both feed-forward layers and the output, and of two norms; the last norm's.
    biases = 4 * D + tower.ffn_dim + D + 2 * D
    return TransformerDense(
        layers=tower.layers,
        dim=D,
        heads=tower.heads,
        ffn_dim=tower.ffn_dim,
        gated=False,
        mean_length=length,
        max_length=N,
        other_parameters=other_parameters + tower.layers * biases + D,
    )

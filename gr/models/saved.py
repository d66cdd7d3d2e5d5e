"""A checkpoint as a model: everything it takes to use one, and nothing of training."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from gr.checkpoint import resolve, verify
from gr.checkpoint.layout import CONFIG, read_progress
from gr.checkpoint.plain import load_weights
from gr.config import RunConfig, load_config
from gr.data.vocabulary import Vocabulary
from gr.dist import World
from gr.embeddings import IdMap, InitialRows, id_map_of, map_ids, move_tables_to_meta, table_weights
from gr.errors import DataError
from gr.models import build_model, import_target
from gr.models.dense import dense_parameters, initialise_dense

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Saved:
    """A model on one device, in evaluation mode, with what it takes to ask it in the log's own ids.

    schema: of its training data. config: of the run that trained it. folder: its checkpoint.
    """

    model: nn.Module
    schema: Any
    config: RunConfig
    folder: Path

    def __post_init__(self) -> None:
        """Reads what else of the checkpoint the model needs."""

    @cached_property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """The values of every column that has ids."""
        columns = self.config.id_columns(self.schema)
        return {name: Vocabulary.open(self.folder, self.schema, name) for name in columns}

    @property
    def id_map(self) -> IdMap | None:
        """The rows of raw ids as of the checkpoint's step, which is only read; None where all ids are rows."""
        return id_map_of(self.model)

    def rows_of(self, column: str, ids_N: torch.Tensor) -> torch.Tensor:
        """The row of each id of a column in its table, which ids themselves are unless they are raw."""
        if self.id_map is None:
            return ids_N
        by_table = self.config.columns_by_table(self.schema)
        table = next(table for table, columns in by_table.items() if column in columns)
        return self.id_map.rows_of(table, ids_N.long())

    def read_lookups(self) -> dict[str, float]:
        """Counts of each table with dynamic ids since the last call: TABLE/ids, those looked up; TABLE/shared, those
        among them that have no row of their own and read the one that such ids share.
        """
        return {} if self.id_map is None else self.id_map.read_lookups()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(
    checkpoint: str | Path, *, device: str = "cpu", plugins: Collection[str] = (), with_tables: bool = True
) -> Saved:
    """The model of a checkpoint, in one process, without process group, plan or training data.

    checkpoint: a run folder (its best, or else its latest) or a step-XXXXXXXX folder. The whole model must fit on
    `device`. plugins: modules that the checkpoint's configuration may have imported; none unless named. What comes back
    is of the class that its kind of experiment names: SavedRetrieval, SavedRanking, SavedClick. with_tables: False
    leaves the weights of the tables on meta.
    Raises CheckpointError for a damaged checkpoint or one of another format, ConfigError for plugins not named.
    """
    path = resolve(checkpoint)
    step = read_progress(path)["step"]
    verify(path, ALONE)
    config = load_config(path / CONFIG, plugins=plugins)
    schema = config.load_schema(path)
    model = build_model(config, schema).to_empty(device=device)
    initialise_dense(model, config.seed)  # buffers, which no checkpoint has
    map_ids(model, InitialRows(config.seed, config.embeddings), ALONE)
    ids = id_map_of(model)
    if not with_tables:
        move_tables_to_meta(model)
    tables = {name: weight.detach() for name, weight in table_weights(model).items() if not weight.is_meta}
    with torch.no_grad():
        dense = {name: p.detach() for name, p in dense_parameters(model).items()}
        load_weights(path, dense, tables, {} if ids is None else ids.raw_ids())
    if ids is not None:
        ids.set_steps(step)
    return import_target(config.saved_target)(model.eval(), schema, config, path)


def as_table(rows: Any) -> pa.Table:
    """A table of pandas, polars or pyarrow, in Arrow. Raises DataError for a column of mixed kinds."""
    try:
        return pa.table(rows)
    except pa.ArrowException as error:
        raise DataError(f"rows: {'; '.join(map(str, error.args))}") from None

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
from gr.embeddings import table_weights
from gr.errors import ConfigError, DataError
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
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(checkpoint: str | Path, *, device: str = "cpu", plugins: Collection[str] = ()) -> Saved:
    """The model of a checkpoint, in one process, without process group, plan or training data.

    checkpoint: a run folder (its best, or else its latest) or a step-XXXXXXXX folder. The whole model must fit on
    `device`. plugins: modules that the checkpoint's configuration may have imported; none unless named. What comes back
    is of the class that its kind of experiment names: SavedRetrieval, SavedRanking, SavedClick.
    Raises CheckpointError for a damaged checkpoint or one of another format, ConfigError for plugins not named and for
    tables whose ids are not rows.
    """
    path = resolve(checkpoint)
    read_progress(path)
    verify(path, ALONE)
    config = load_config(path / CONFIG, plugins=plugins)
    schema = config.load_schema(path)
    for table in config.columns_by_table(schema):
        if (kind := config.embeddings.ids_of(table).kind) != "dense":
            raise ConfigError(
                f"{path}: embeddings.tables.{table} has {kind} ids, whose rows models in one process (gr.load, "
                "gr export, gr export-weights) do not know yet; use gr predict, gr recommend or gr evaluate"
            )
    model = build_model(config, schema).to_empty(device=device)
    initialise_dense(model, config.seed)  # buffers, which no checkpoint has
    tables = {name: weight.detach() for name, weight in table_weights(model).items()}
    with torch.no_grad():
        load_weights(path, {name: p.detach() for name, p in dense_parameters(model).items()}, tables)
    return import_target(config.saved_target)(model.eval(), schema, config, path)


def as_table(rows: Any) -> pa.Table:
    """A table of pandas, polars or pyarrow, in Arrow. Raises DataError for a column of mixed kinds."""
    try:
        return pa.table(rows)
    except pa.ArrowException as error:
        raise DataError(f"rows: {'; '.join(map(str, error.args))}") from None

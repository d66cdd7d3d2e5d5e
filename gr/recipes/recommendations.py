"""Recommendations as one Parquet file, written by all ranks: each its own part, joined in the order of ranks."""

import os
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from tqdm import tqdm

from gr.dist import World
from gr.errors import ConfigError
from gr.files import is_transient
from gr.recipes.base import Recipe

SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("score", pa.float32()), ("place", pa.int32())])


def write_recommendations(
    recipe: Recipe, model: nn.Module, world: World, out: Path, *, k: int, holdout: Literal[0, 1]
) -> dict[str, int]:
    """Writes `out` under its name once it is whole; returns the numbers of users, of users without history, of rows.

    Raises ConfigError, and leaves no file, where it cannot be written. Collective.
    """
    part, users, rows = _part(out, world.rank), 0, 0
    try:
        world.on_all(part.touch)
        with pq.ParquetWriter(part, SCHEMA) as writer:
            parts = recipe.recommend(model, world, k, holdout)
            for some in tqdm(parts, desc="users", unit="batch", disable=None if world.is_main else True):
                columns = (some.user_N, some.item_N, some.score_N, some.place_N)
                if len(some.user_N):
                    writer.write_table(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA))
                users, rows = users + some.users, rows + len(some.user_N)
        total_users, total_rows = (int(count) for count in world.all_reduce_sum([float(users), float(rows)]))
        # No rank removes its part, or returns, before the file has its name.
        world.on_all(lambda: _join(out, world.size) if world.is_main else None)
    except OSError as error:
        if is_transient(error):
            raise
        why = os.strerror(error.errno) if error.errno else error.strerror or error
        raise ConfigError(f"out={out}: cannot be written: {why}; name another file") from error
    finally:
        for left in (part, *([_whole(out)] if world.is_main else [])):
            if left.exists():
                left.unlink()
    without = recipe.evaluation_data.rows - total_users  # type: ignore[attr-defined]
    return {"users": total_users, "without_history": without, "rows": total_rows}


def _whole(out: Path) -> Path:
    return out.with_name(f".{out.name}.whole")


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f".{out.name}.{rank}")


def _join(out: Path, ranks: int) -> None:
    """One file of the parts, one row group at a time."""
    with pq.ParquetWriter(_whole(out), SCHEMA) as writer:
        for rank in range(ranks):
            with pq.ParquetFile(_part(out, rank)) as part:
                for index in range(part.num_row_groups):
                    writer.write_table(part.read_row_group(index))
    _whole(out).rename(out)

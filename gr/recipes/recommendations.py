"""Recommendations as one Parquet file, written by all ranks: each its own part, joined in the order of ranks."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from tqdm import tqdm

from gr.dist import World
from gr.errors import ConfigError
from gr.recipes.base import Recipe

SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("score", pa.float32()), ("place", pa.int32())])


def write_recommendations(
    recipe: Recipe, model: nn.Module, world: World, out: Path, *, k: int, holdout: Literal[0, 1]
) -> dict[str, int]:
    """Writes `out` under its name once it is whole; returns the numbers of users, of users without history, of rows.

    Raises ConfigError where its folder cannot be written. Collective.
    """
    part, users, rows = _part(out, world.rank), 0, 0
    fault = ""
    try:
        writer = pq.ParquetWriter(part, SCHEMA)
    except OSError as error:
        fault = f"--out={out}: cannot be written: {error.strerror or error}; name another file"
    if faults := [each for each in world.gather_text(fault) if each]:
        raise ConfigError(faults[0])
    try:
        with writer:
            parts = recipe.recommend(model, world, k, holdout)
            for some in tqdm(parts, desc="users", unit="batch", disable=None if world.is_main else True):
                columns = (some.user_N, some.item_N, some.score_N, some.place_N)
                if len(some.user_N):
                    writer.write_table(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA))
                users, rows = users + some.users, rows + len(some.user_N)
        total_users, total_rows = (int(count) for count in world.all_reduce_sum([float(users), float(rows)]))
        if world.is_main:
            _join(out, world.size)
        world.from_main("")  # no rank removes its part, or returns, before the file has its name
    finally:
        part.unlink(missing_ok=True)
    without = recipe.evaluation_data.rows - total_users  # type: ignore[attr-defined]
    return {"users": total_users, "without_history": without, "rows": total_rows}


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f".{out.name}.{rank}")


def _join(out: Path, ranks: int) -> None:
    """One file of the parts, one row group at a time."""
    whole = out.with_name(f".{out.name}.whole")
    with pq.ParquetWriter(whole, SCHEMA) as writer:
        for rank in range(ranks):
            with pq.ParquetFile(_part(out, rank)) as part:
                for index in range(part.num_row_groups):
                    writer.write_table(part.read_row_group(index))
    whole.rename(out)

"""Parts that the generators share: streams of random numbers, an urn, chunks of rows, and the writing of histories.

B rows of a chunk, N events of a record, G slots of an urn.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from gr.errors import ConfigError
from gr.prepare.write import ROWS_PER_GROUP, FolderWriter, Users
from gr.schema import DataSchema, HistoryColumns

HISTORY_CHUNK = 8 * ROWS_PER_GROUP  # records drawn together; part of the definitions, as each has its random stream
LARGEST_SIZE = 1 << 44  # beyond it arrays are of more bytes than numpy can count, and memory ends long before
START_SECOND, DAY_SECONDS = 978_307_200, 86_400  # 2001-01-01
ORACLE_FILE = "oracle.json"
Chunk = TypeVar("Chunk")


def size(default: Any, text: str | None = None, at_least: int | None = None, at_most: int = LARGEST_SIZE) -> Any:
    """A field of a generator's options, with what `gr prepare` says and, given at_least, requires of it."""
    return field(default=default, metadata={"help": text, "at_least": at_least, "at_most": at_most})


def seed() -> Any:
    """The field of a generator's options that chooses all of its random numbers."""
    return size(1, at_least=0, at_most=np.iinfo(np.int64).max)


def random_stream(seed: int, stream: int) -> np.random.Generator:
    """Independent random numbers for each (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def urn_slots(
    random: np.random.Generator, weight_BG: np.ndarray, total_B: np.ndarray, slots_B: np.ndarray | int
) -> np.ndarray:
    """One draw from the urn of each row, int64 [B]: slot g with probability weight / total.

    slots_B: slots of positive weight, which come first.
    """
    level_B = random.random(len(weight_BG)) * total_B
    slot_B = (np.cumsum(weight_BG, axis=1) <= level_B[:, None]).sum(axis=1)
    return np.minimum(slot_B, slots_B - 1)  # rounding may put the level at the very end


def rows_between(draw: Callable[[int], Chunk], chunk_rows: int, first: int, stop: int) -> Iterator[Chunk]:
    """Rows [first, stop) of numbered chunks of chunk_rows rows. A chunk is a dataclass of arrays over its rows."""
    for number in range(first // chunk_rows, -(-stop // chunk_rows)):
        start, chunk = number * chunk_rows, draw(number)
        rows = slice(max(first - start, 0), min(stop - start, chunk_rows))
        yield type(chunk)(**{name: values[rows] for name, values in vars(chunk).items()})


def require_at_least(options: Any, limits: Mapping[str, int], reasons: Mapping[str, str] | None = None) -> None:
    """ConfigError for a field of `options` below its limit. reasons: ends of the first sentence, by field."""
    for name, limit in limits.items():
        if (value := getattr(options, name)) < limit:
            reason = (reasons or {}).get(name, "")
            raise ConfigError(f"{name}={value}: must be at least {limit}{reason}; set {name} higher")


def stated(command: str, options: Any, more: str = "") -> str:
    """The field `source` of a generated folder. options: a dataclass."""
    return f"{command} {json.dumps(asdict(options))}{more}"


def equal_length_users(record_B: np.ndarray, items_BN: np.ndarray, times_BN: np.ndarray | None = None) -> Users:
    """Records of N events each as users, whose ids are the numbers of the records."""
    offsets = np.arange(len(items_BN) + 1, dtype=np.int64) * items_BN.shape[1]
    return Users(record_B, offsets, items_BN.ravel(), None if times_BN is None else times_BN.ravel())


def write_histories(
    folder: Path, users: Iterable[Users], columns: HistoryColumns, *, items: int, name: str, source: str
) -> DataSchema:
    """Write generated users over items 1..items as a data folder."""
    writer = FolderWriter(folder, columns, item_cardinality=items + 1)
    with tqdm(unit="user", desc=name, disable=None) as bar:
        for chunk in users:
            writer.write(chunk)
            bar.update(len(chunk.user_ids))
    return writer.close(name=name, order="as generated, oldest first", source=source, corpus=np.arange(1, items + 1))


def write_oracle(folder: Path, oracle: dict[str, Any]) -> dict[str, Any]:
    """Write oracle.json; returns the oracle."""
    (folder / ORACLE_FILE).write_text(json.dumps(oracle, indent=2) + "\n", encoding="utf-8")
    return oracle

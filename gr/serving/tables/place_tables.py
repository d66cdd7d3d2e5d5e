"""Puts the tables of a package on its cards, by their bytes and by the time that their lookups take here."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gr.config.export import ExportConfig
from gr.errors import ServingError
from gr.planner.estimate_serving import ROW_BYTES
from gr.planner.partition import Partition, ServedTable, partition
from gr.serving.package.layout import CardRecord, CardsRecord
from gr.serving.package.weights import write_tensors
from gr.serving.passes.build import CardTables
from gr.serving.tables.card_tables import BATCH, pooling
from gr.serving.tables.packed import PackedTables
from gr.serving.tables.quantize import RowKind

_TIMES = 7  # the least of so many counts: others on the machine only make it more


def packed(tables: CardTables, kinds: Mapping[str, RowKind], names: tuple[str, ...]) -> PackedTables:
    """Some of the tables, as a card has them."""
    weights = {name: tables.weights[name] for name in names}
    return PackedTables(weights, kinds, tables.columns, pooled=not tables.row_weights)


@torch.inference_mode()
def measured_costs(tables: CardTables, kinds: Mapping[str, RowKind]) -> dict[str, float]:
    """Microseconds of the lookups of BATCH rows with ids at random, by table, each alone and by one thread."""
    hots, threads = dict(tables.ids), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    costs = {}
    torch.set_num_threads(1)
    try:
        for name, weight in tables.weights.items():
            look_up = pooling(packed(tables, kinds, (name,)), tables.dim, tables.row_weights)
            counts = [hots[feature] for feature in tables.columns[name]]
            lengths = torch.tensor(counts).repeat_interleave(BATCH)
            offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
            ids = torch.randint(len(weight), (int(offsets[-1]),), generator=generator, dtype=torch.int32)
            vectors = torch.empty(look_up(ids, offsets).shape, dtype=torch.float16)
            costs[name] = min(_seconds(look_up, ids, offsets, vectors) for _ in range(_TIMES)) * 1e6
    finally:
        torch.set_num_threads(threads)
    return costs


def _seconds(look_up: torch.nn.Module, ids: Tensor, offsets: Tensor, vectors: Tensor) -> float:
    started = time.perf_counter()
    vectors.copy_(look_up(ids, offsets))
    return time.perf_counter() - started


@dataclass(frozen=True)
class Placement:
    """costs: microseconds of lookups, by table."""

    partition: Partition
    costs: Mapping[str, float]


def place(
    tables: CardTables, kinds: Mapping[str, RowKind], config: ExportConfig, costs: Mapping[str, float] | None = None
) -> Placement:
    """The cards of the tables. costs: None: they are measured.

    Raises ServingError where there are fewer tables than cards, and for tables that do not fit.
    """
    if config.cards > len(tables.weights):
        raise ServingError(
            f"cards={config.cards}: the model has {len(tables.weights)} tables, and a card without one does nothing; "
            f"set cards={len(tables.weights)} or fewer"
        )
    costs = measured_costs(tables, kinds) if costs is None else costs
    served = []
    for name, weight in tables.weights.items():
        rows, dim = weight.shape
        served.append(ServedTable(name, rows, dim, *ROW_BYTES[kinds[name]], costs[name]))
    room = float("inf") if config.card_bytes is None else float(config.card_bytes)
    return Placement(partition(served, config.cards, room), costs)


def write_cards(folder: Path, tables: CardTables, kinds: Mapping[str, RowKind], placement: Placement) -> CardsRecord:
    """Writes a file of tables a card, and returns what a manifest says of them."""
    done, cards = placement.partition, []
    for card, held in enumerate(done.tables_K):
        names = tuple(table.name for table in held)
        stored, file = packed(tables, kinds, names), f"tables-{card}.safetensors"
        write_tensors(folder / file, stored.state_dict())
        size = int(done.bytes_K[card])
        cards.append(CardRecord(file=file, tables=names, bytes=size, cost=done.cost_K[card], layout=stored.layout))
    return CardsRecord(
        cards=tuple(cards),
        columns=tuple(tables.ids),
        features=tuple(tables.features),
        dim=tables.dim,
        row_weights=tables.row_weights,
        costs=dict(placement.costs),
        bytes_bound=done.bytes_bound,
        cost_bound=done.cost_bound,
    )

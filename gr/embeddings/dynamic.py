"""The rows of raw ids: tables whose column has hashed or dynamic ids (embeddings.tables.COLUMN.ids).

A step's ids are turned into rows before they are looked up. A hashed row is a function of the id. Dynamic rows are
given and taken back by gr.ops.id_table, whose sets the ranks share evenly, whatever the plan of the table itself: ids
go to the ranks that have their sets, rows come back. So the map is that of one rank. Evaluation only reads it.

T ids of this rank, U distinct ones, S sets of A ways, R ranks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from gr.config.features import ID_MAP, DynamicIds, HashedIds
from gr.dist import World
from gr.embeddings.collection import is_candidate
from gr.embeddings.init import InitialRows
from gr.embeddings.state import sharded
from gr.errors import ConfigError
from gr.ops.id_table import EMPTY, MOST_SETS, IdTable, count_ids, find_rows, id_table_step, set_of, tag_of
from gr.ops.splitmix64 import hashed_rows

# Half-lives after which the scores of LFU are written in another unit, so that they stay within float32.
_UNIT = 64
USES = ("hits", "admitted", "evicted", "shared")
# TorchRec's collections, whole and sharded, keep their tables' configurations under one of these names.
_CONFIGS = ("_embedding_configs", "_embedding_bag_configs")


@dataclass(frozen=True)
class HandedOver:
    """Rows of a table that a step gives to other ids, of all ranks: int64 row_N of the whole table, and raw id_N.

    Before the step's lookup each gets the initial vector of its id and zero optimizer states
    (TableOptimizer.hand_over).
    """

    table: str
    row_N: Tensor
    id_N: Tensor


@dataclass(frozen=True)
class IdEntry:
    """One tensor of an id table as a checkpoint keeps it (gr.checkpoint.store.SavedTable): sharded by sets."""

    name: str
    value: ShardedTensor
    is_rowwise: bool = False
    column_widths: tuple[int, ...] = ()

    def fill_rowwise(self, saved: Tensor, widths: Sequence[int]) -> None:
        raise TypeError(f"{self.name} has no column blocks")


class DynamicTable:
    """The id table of one table with dynamic ids: this rank's sets of it."""

    def __init__(self, name: str, ids: DynamicIds, world: World) -> None:
        sets = ids.sets
        if not world.size <= sets <= MOST_SETS:
            raise ConfigError(
                f"embeddings.tables.{name}.ids: rows={ids.rows} in ways of {ids.ways} are {sets} sets; the "
                f"{world.size} ranks of this run need {world.size} to {MOST_SETS}: change rows or ways"
            )
        self.name, self.config = name, ids
        self.bounds = torch.tensor([sets * rank // world.size for rank in range(world.size + 1)])
        first, stop = self.bounds[world.rank : world.rank + 2].tolist()
        score = torch.int32 if ids.eviction == "lru" else torch.float32
        self.table = IdTable.empty(first, stop, sets, ids.ways, score, counted=ids.min_count > 1)
        self.steps = 0
        self.counts: Counter[str] = Counter()

    def owner(self, ids: Tensor) -> Tensor:
        """The rank that has the set of each id."""
        return torch.bucketize(set_of(ids, self.table.sets), self.bounds[1:], right=True)

    def use(self, ids_U: Tensor, uses_U: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The rows of distinct ids of this rank's sets, int64 [U], and the indices of those that were just given one.

        step: from 0. Ids of no uses are only looked up.
        """
        self._age(step)
        did = id_table_step(self.table, ids_U, uses_U, self._stamp(step), self.config.min_count)
        entered = int(uses_U[did.entered_N].sum())
        shared = int(uses_U[did.row_U % self.table.ways == 0].sum())
        self.counts.update(
            hits=int(uses_U.sum()) - entered - shared,
            admitted=len(did.entered_N),
            evicted=int((did.evicted_N != EMPTY).sum()),
            shared=shared,
        )
        return did.row_U, did.entered_N

    def find(self, ids_U: Tensor) -> Tensor:
        """The rows of ids of this rank's sets, int64 [U]; the map stays as it is."""
        table = self.table
        return find_rows(table.key_SA, table.tag_SA, ids_U, first=table.first, sets=table.sets)

    def _stamp(self, step: int) -> float:
        """Under LRU the step, from 1. Under LFU what a use of the step counts, in the unit of the scores."""
        if self.config.eviction == "lru":
            return step + 1
        age = step / self.config.half_life
        return 2.0 ** (age - age // _UNIT * _UNIT)

    def _age(self, step: int) -> None:
        """Halves the counts of ids without a row at every half-life, and changes the unit of LFU's scores when due."""
        now, before = (each // self.config.half_life for each in (step, max(self.steps - 1, 0)))
        self.steps = step + 1
        if now == before:
            return
        if self.table.seen_SC is not None:
            halvings = int(now - before)
            self.table.seen_SC.zero_() if halvings > 7 else self.table.seen_SC.bitwise_right_shift_(halvings)
        units = now // _UNIT - before // _UNIT
        if self.config.eviction == "lfu" and units:
            self.table.score_SA.mul_(2.0 ** (-_UNIT * units))

    def set_steps(self, steps: int) -> None:
        """Steps done, after a checkpoint was loaded. 0: another run begins with its ids, of which none is stronger."""
        self.steps = steps
        self.table.tag_SA.copy_(tag_of(self.table.key_SA))
        if not steps:
            self.table.score_SA.clamp_(max=0)

    @property
    def raw_id_name(self) -> str:
        """A checkpoint's name for the ids of all ways, int64 [sets, ways], among its tables."""
        return f"{self.name}{ID_MAP}.raw_id"

    def entries(self) -> Iterator[IdEntry]:
        """The tensors of the map as a checkpoint keeps them, each [sets, ...] over all ranks."""
        tensors = {"raw_id": self.table.key_SA, "score": self.table.score_SA, "seen": self.table.seen_SC}
        for name, tensor in tensors.items():
            if tensor is not None:
                # Not under the table's own name: ranks that hold none of its rows have sets of its ids.
                yield IdEntry(f"{self.name}{ID_MAP}.{name}", self._sharded(tensor))

    def _sharded(self, tensor: Tensor) -> ShardedTensor:
        bounds, width = self.bounds.tolist(), tensor.shape[1]
        everywhere = [
            ShardMetadata([first, 0], [stop - first, width], f"rank:{rank}/cpu")
            for rank, (first, stop) in enumerate(pairwise(bounds))
        ]
        return sharded(everywhere, [tensor])


class IdMap:
    """The rows of the raw ids of one collection. Every rank makes the same calls in the same order."""

    def __init__(self, features: Mapping[str, Sequence[str]], initial: InitialRows, world: World) -> None:
        """features: that read each table, by its name. initial: values of the rows that are handed over.

        Raises ConfigError where a table has too few sets.
        """
        self.initial, self.world = initial, world
        self.hashed: dict[str, HashedIds] = {}
        self.dynamic: dict[str, DynamicTable] = {}
        self.features = {}
        for table, names in features.items():
            ids = initial.embeddings.ids_of(table)
            if isinstance(ids, HashedIds):
                self.hashed[table] = ids
            elif isinstance(ids, DynamicIds):
                self.dynamic[table] = DynamicTable(table, ids, world)
            else:
                continue
            self.features[table] = list(names)
        self.looked_up: dict[str, Counter[str]] = {table: Counter() for table in self.dynamic}

    def train(self, features: KeyedJaggedTensor, step: int) -> tuple[KeyedJaggedTensor, list[HandedOver]]:
        """The features by rows, and the rows that the step hands over. Candidates are given none by being drawn."""
        return self._rows(features, step)

    def find(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features by rows; no id is given one. Counts the ids that share a row, in looked_up."""
        return self._rows(features, None)[0]

    def _rows(self, features: KeyedJaggedTensor, step: int | None) -> tuple[KeyedJaggedTensor, list[HandedOver]]:
        """step: None where the map is only read."""
        keys, device = features.keys(), features.values().device
        ids = dict(zip(keys, features.values().cpu().split(features.length_per_key()), strict=True))
        for table, hashed in self.hashed.items():
            for name in self.features[table]:
                ids[name] = hashed_rows(ids[name], hashed.rows)
        distinct = {table: _distinct([ids[name] for name in self.features[table]]) for table in self.dynamic}
        uses = {table: self._uses(table, ids, distinct[table], step) for table in self.dynamic}
        rows, handed = self._exchange({table: (distinct[table][0], uses[table]) for table in self.dynamic}, step)
        for table, dynamic in self.dynamic.items():
            row_T = rows[table].gather(0, distinct[table][2])  # faster than indexing
            if step is None:
                shared = int((row_T % dynamic.table.ways == 0).sum())
                self.looked_up[table].update(ids=len(row_T), shared=shared)
            names = self.features[table]
            ids |= zip(names, row_T.split([len(ids[name]) for name in names]), strict=True)
        values = torch.cat([ids[key] for key in keys]).to(device)
        return KeyedJaggedTensor(keys, values, lengths=features.lengths(), stride=features.stride()), handed

    def _uses(self, table: str, ids: Mapping[str, Tensor], distinct: tuple[Tensor, ...], step: int | None) -> Tensor:
        """How often the step uses each distinct id: not as a candidate, and not at all where the map is only read."""
        ids_U, uses_U, place_T = distinct
        used = [step is not None and not is_candidate(name) for name in self.features[table]]
        if all(used):
            return uses_U
        places = place_T.split([len(ids[name]) for name in self.features[table]])
        chosen = [place for place, counts in zip(places, used, strict=True) if counts]
        return torch.bincount(torch.cat([*chosen, place_T[:0]]), minlength=len(ids_U))

    def _exchange(
        self, asked: Mapping[str, tuple[Tensor, Tensor]], step: int | None
    ) -> tuple[dict[str, Tensor], list[HandedOver]]:
        """The rows of each table's distinct ids, given with their uses on this rank; and what all ranks hand over."""
        world, ranks = self.world, self.world.size
        if ranks == 1 or not asked:
            own = {table: self._own(table, *both, step) for table, both in asked.items()}
            return {table: row_U for table, (row_U, _) in own.items()}, [handed for _, handed in own.values()]
        owners = {table: self.dynamic[table].owner(ids_U) for table, (ids_U, _) in asked.items()}
        order = {table: owner.argsort(stable=True) for table, owner in owners.items()}
        send_RF = torch.stack([torch.bincount(owner, minlength=ranks) for owner in owners.values()], 1)
        everyone = torch.tensor(world.all_gather_ints(send_RF.flatten().tolist())).view(ranks, ranks, -1)
        receive_RF = everyone[:, world.rank]
        pairs = [torch.stack(asked[table], 1)[order[table]] for table in asked]
        received = self._send(_by_rank(pairs, send_RF), send_RF, receive_RF)
        own_rows, entered = [], []
        for place, (table, pairs_N2) in enumerate(zip(asked, _by_table(received, receive_RF), strict=True)):
            id_N, uses_N = pairs_N2.unbind(1)
            ids_U, uses_U, place_N = _merged(id_N, uses_N)
            row_U, handed = self._own(table, ids_U, uses_U, step)
            row_N = row_U.gather(0, place_N)
            own_rows.append(row_N[:, None])
            entered.append(torch.stack([torch.full_like(handed.row_N, place), handed.row_N, handed.id_N], 1))
        answers = self._send(_by_rank(own_rows, receive_RF), receive_RF, send_RF)
        rows = {}
        for table, answer in zip(asked, _by_table(answers, send_RF), strict=True):
            rows[table] = torch.empty(len(answer), dtype=torch.int64)
            rows[table][order[table]] = answer.squeeze(1)
        if step is None:
            return rows, []
        handed_N3 = torch.cat(world.all_gather_variable(torch.cat(entered).flatten())).view(-1, 3)
        chosen = [handed_N3[handed_N3[:, 0] == place] for place in range(len(entered))]
        return rows, [HandedOver(table, each[:, 1], each[:, 2]) for table, each in zip(asked, chosen, strict=True)]

    def _send(self, rows_NF: Tensor, send_RF: Tensor, receive_RF: Tensor) -> Tensor:
        return self.world.exchange_rows(rows_NF, send_RF.sum(1).tolist(), receive_RF.sum(1).tolist())

    def _own(self, table: str, ids_U: Tensor, uses_U: Tensor, step: int | None) -> tuple[Tensor, HandedOver]:
        """The rows of distinct ids of this rank's sets, with their uses on all ranks, and what this rank hands over."""
        dynamic = self.dynamic[table]
        if step is None:
            return dynamic.find(ids_U), HandedOver(table, ids_U[:0], ids_U[:0])
        row_U, entered = dynamic.use(ids_U, uses_U, step)
        return row_U, HandedOver(table, row_U[entered], ids_U[entered])

    def rows_of(self, table: str, ids_N: Tensor) -> Tensor:
        """The row of each of a table's raw ids, int64 [N]: they are rows themselves where its ids are dense.

        It reads the map alone, of one rank that has all sets.
        """
        if table in self.hashed:
            return hashed_rows(ids_N, self.hashed[table].rows)
        return self.dynamic[table].find(ids_N) if table in self.dynamic else ids_N

    def raw_ids(self) -> dict[str, Tensor]:
        """The ids of all ways of each dynamic table, int64 [sets, ways], by their names in a checkpoint, to be read."""
        return {each.raw_id_name: each.table.key_SA for each in self.dynamic.values()}

    def set_steps(self, steps: int) -> None:
        """Steps done, after a checkpoint was loaded."""
        for table in self.dynamic.values():
            table.set_steps(steps)

    def entries(self) -> list[IdEntry]:
        """The maps as a checkpoint keeps them."""
        return [entry for table in self.dynamic.values() for entry in table.entries()]

    def read_counts(self) -> dict[str, float]:
        """Counts of each table since the last call, over all ranks: uses of ids that had a row (hits), ids admitted,
        ids evicted, uses of the shared rows. Collective.
        """
        return self._total({name: table.counts for name, table in self.dynamic.items()}, USES)

    def read_lookups(self) -> dict[str, float]:
        """Counts of each table since the last call, over all ranks, where the map was only read: ids looked up, and
        those among them that have no row (shared). Collective.
        """
        return self._total(self.looked_up, ("ids", "shared"))

    def _total(self, counters: Mapping[str, Counter[str]], names: Sequence[str]) -> dict[str, float]:
        own = {f"{table}/{name}": float(counter[name]) for table, counter in counters.items() for name in names}
        for counter in counters.values():
            counter.clear()
        return dict(zip(own, self.world.all_reduce_sum(list(own.values())), strict=True))


def map_ids(model: nn.Module, initial: InitialRows, world: World) -> None:
    """Has the tables of a sharded model read raw ids where they are configured so: evaluation through their forward,
    training through TrainModule, which asks id_map_of.
    """
    for module in model.modules():
        own = (getattr(module, name) for name in _CONFIGS if hasattr(module, name))
        configs: list[BaseEmbeddingConfig] = next(own, [])
        ids_of = initial.embeddings.ids_of
        features = {each.name: each.feature_names for each in configs if ids_of(each.name).kind != "dense"}
        if features:
            id_map = IdMap(features, initial, world)
            module.id_map = id_map  # type: ignore[assignment]  # nn.Module's own annotation: it is no submodule

            def by_rows(_: nn.Module, arguments: tuple[Any, ...], id_map: IdMap = id_map) -> tuple[Any, ...]:
                return (id_map.find(arguments[0]), *arguments[1:])

            module.register_forward_pre_hook(by_rows)


def id_map_of(model: nn.Module) -> IdMap | None:
    """The map of raw ids of a model's tables; None where they read rows."""
    maps = (getattr(module, "id_map", None) for module in model.modules())
    return next((each for each in maps if isinstance(each, IdMap)), None)


def _distinct(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return count_ids(torch.cat(list(ids)).long())


def _merged(id_N: Tensor, uses_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct ids, their uses over all ranks, the place of each of id_N among them)."""
    ids_U, _, place_N = count_ids(id_N)
    return ids_U, torch.zeros_like(ids_U).index_add_(0, place_N, uses_N), place_N


def _by_rank(tables: Sequence[Tensor], sizes_RF: Tensor) -> Tensor:
    """Tensors of each table, ordered by rank, as one that has all tables of rank 0, then all of rank 1, and so on."""
    parts = [each.split(sizes) for each, sizes in zip(tables, sizes_RF.T.tolist(), strict=True)]
    return torch.cat([part for of_rank in zip(*parts, strict=True) for part in of_rank])


def _by_table(rows_NF: Tensor, sizes_RF: Tensor) -> list[Tensor]:
    """The tensors that _by_rank joined."""
    parts, tables = rows_NF.split(sizes_RF.flatten().tolist()), sizes_RF.shape[1]
    return [torch.cat(parts[table::tables]) for table in range(tables)]

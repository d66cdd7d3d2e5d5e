"""The id table: the C++ against the definition, at any split of the sets, and against an LRU cache that is not
divided.
"""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from gr.ops.backend import Backend, force_backend
from gr.ops.id_table import EMPTY, IdTable, count_ids, find_rows, id_table_step, set_of
from gr.ops.splitmix64 import splitmix64

BACKENDS: tuple[Backend, ...] = ("native", "torch")


def new_table(sets: int, ways: int, score: torch.dtype = torch.int32, *, counted: bool = False, part=(0, 1)) -> IdTable:
    first, stop = (sets * (part[0] + more) // part[1] for more in (0, 1))
    return IdTable.empty(first, stop, sets, ways, score, counted=counted)


def catalogue(steps: int, uses: int = 1024, seed: int = 0) -> list[Tensor]:
    """Ids of a catalogue that moves: 20 new ones a step, an id of age a used in proportion to 1 / (a + 1)."""
    random = torch.Generator().manual_seed(seed)
    ages = [(torch.exp(torch.rand(uses, generator=random) * 9) - 1).long() for _ in range(steps)]
    return [splitmix64(20 * step - age) >> 1 for step, age in enumerate(ages)]


def walked(backend: Backend, tables: list[IdTable], stream: list[Tensor], min_count: int) -> list[tuple[Tensor, ...]]:
    """What each step did, in the order of the rows, whatever the number of tables that share the sets."""
    done = []
    with force_backend(backend):
        for step, ids_T in enumerate(stream):
            ids_U, uses_U, _ = count_ids(ids_T)
            rows, entered = torch.empty_like(ids_U), []
            for table in tables:
                own = set_of(ids_U, table.sets) - table.first
                chosen = ((own >= 0) & (own < len(table.key_SA))).nonzero().squeeze(1)
                did = id_table_step(table, ids_U[chosen], uses_U[chosen], step + 1, min_count)
                rows[chosen] = did.row_U
                new = chosen[did.entered_N]
                entered.append(torch.stack([rows[new], ids_U[new], did.evicted_N]))
            by_id, changed = ids_U.argsort(), torch.cat(entered, 1)
            done.append((rows[by_id], changed[:, changed[0].argsort()]))
    return done


@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("score", [torch.int32, torch.float32])
@pytest.mark.parametrize(("sets", "ways"), [(64, 20), (13, 100)])
def test_one_map_under_every_implementation_and_split(sets: int, ways: int, score: torch.dtype, min_count: int) -> None:
    expected = None
    for backend, parts in [("torch", 1), ("native", 1), ("torch", 3), ("native", 4)]:
        tables = [new_table(sets, ways, score, counted=min_count > 1, part=(part, parts)) for part in range(parts)]
        did = walked(backend, tables, catalogue(20), min_count)
        names = ("key_SA", "score_SA", "tag_SA") + (("seen_SC",) if min_count > 1 else ())
        state = [torch.cat([getattr(table, name) for table in tables]) for name in names]
        if expected is None:
            expected = did, state
            assert sum(int((changed[2] != EMPTY).sum()) for _, changed in did) > 1280, "most rows change hands"
            continue
        for (rows, changed), (rows_there, changed_there) in zip(did, expected[0], strict=True):
            assert torch.equal(rows, rows_there)
            assert torch.equal(changed, changed_there)
        assert all(torch.equal(one, other) for one, other in zip(state, expected[1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_id_with_a_row_has_it_alone(backend: Backend) -> None:
    table, owner = new_table(16, 8), {}
    for step, ids_T in enumerate(catalogue(10, 64)):
        with force_backend(backend):
            ids_U, uses_U, place_T = count_ids(ids_T)
            did = id_table_step(table, ids_U, uses_U, step + 1)
        assert torch.equal(ids_U[place_T], ids_T)
        assert torch.equal(uses_U, torch.bincount(place_T))
        for place in did.entered_N.tolist():
            owner[int(did.row_U[place])] = int(ids_U[place])
        for row, raw in zip(did.row_U.tolist(), ids_U.tolist(), strict=True):
            assert row % 8 == 0 or owner[row] == raw
        assert torch.equal(did.row_U // 8, set_of(ids_U, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_of_no_uses_changes_nothing(backend: Backend) -> None:
    table = new_table(4, 4, counted=True)
    with force_backend(backend):
        did = id_table_step(table, torch.arange(1, 9), torch.zeros(8, dtype=torch.int64), 1)
    assert (did.row_U % 4 == 0).all()
    assert not len(did.entered_N)
    assert (table.key_SA == EMPTY).all()
    assert table.seen_SC is not None
    assert not table.seen_SC.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_admission_counts_uses_over_steps(backend: Backend) -> None:
    table, raw = new_table(1, 8, counted=True), torch.tensor([77])
    with force_backend(backend):
        rows = [int(id_table_step(table, raw, torch.tensor([1]), step, 3).row_U) for step in (1, 2, 3)]
    assert rows == [0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weakest_way_goes_first(backend: Backend) -> None:
    """One set of three ways that can be held. LRU: of 1, 2, 3 the second is used last; LFU: it is used most."""
    for score in (torch.int32, torch.float32):
        table = new_table(1, 4, score)
        with force_backend(backend):
            for step, ids in enumerate(([1, 2, 3], [1], [3], [2, 2, 2])):
                ids_U, uses_U, _ = count_ids(torch.tensor(ids))
                id_table_step(table, ids_U, uses_U, step + 1 if score == torch.int32 else 1.0)
            did = id_table_step(table, torch.tensor([8, 9]), torch.tensor([5, 9]), 9)
        assert did.evicted_N.tolist() == [1, 3]
        assert did.entered_N.tolist() == [1, 0], "the id with more uses comes first"


def test_hit_rate_is_that_of_an_undivided_cache() -> None:
    """64 ways against a fully associative LRU of as many rows, on a stream most of whose ids do not fit."""
    table, cache, hits = new_table(32, 64), OrderedDict(), [0, 0]
    for step, ids_T in enumerate(catalogue(60, 2048)):
        ids_U, uses_U, _ = count_ids(ids_T)
        held = (table.key_SA[set_of(ids_U, 32)] == ids_U[:, None]).any(1)
        id_table_step(table, ids_U, uses_U, step + 1)
        there = torch.tensor([int(raw) in cache for raw in ids_U])
        for place, known in enumerate((held, there)):
            hits[place] += int(uses_U[known].sum())
        for raw in ids_U.tolist():
            cache[raw] = None
            cache.move_to_end(raw)
        while len(cache) > 32 * 64:
            cache.popitem(last=False)
    assert hits[0] / hits[1] == pytest.approx(1, abs=0.01)


def test_refuses_ids_of_another_ranks_sets() -> None:
    ids = torch.arange(64)
    with force_backend("native"), pytest.raises(ValueError, match="another rank's sets"):
        id_table_step(new_table(64, 4, part=(0, 2)), ids, torch.ones_like(ids), 1)


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="one length"):
        id_table_step(new_table(4, 4), torch.arange(3), torch.ones(2, dtype=torch.int64), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ways", [2, 8, 13, 100])
def test_rows_that_are_only_read_are_those_of_a_step(backend: Backend, ways: int) -> None:
    """Of ids with and without a row, given more than once, by one rank of two; the first way is of those without."""
    table = IdTable.empty(5, 11, 11, ways, torch.int32, counted=False)
    ids = torch.arange(400)
    own = ids[set_of(ids, 11) >= 5]
    id_table_step(table, own[::2], torch.ones_like(own[::2]), 1.0)
    expected = id_table_step(table, own, torch.zeros_like(own), 1.0).row_U
    with force_backend(backend):
        rows = find_rows(table.key_SA, table.tag_SA, own.repeat(2), first=5, sets=11)
    assert torch.equal(rows, expected.repeat(2))
    assert 0 < int((rows % ways > 0).sum()) < len(rows)


def test_reading_refuses_ids_of_other_sets() -> None:
    table = IdTable.empty(0, 1, 2, 4, torch.int32, counted=False)
    other = torch.arange(20)[set_of(torch.arange(20), 2) == 1]
    with force_backend("native"), pytest.raises(ValueError, match="is of another rank's sets"):
        find_rows(table.key_SA, table.tag_SA, other, sets=2)

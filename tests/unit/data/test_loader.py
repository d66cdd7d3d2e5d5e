"""The loader: the same global batches for every world size, exact resumption, errors and counters."""

import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from gr.config.histories import HistoryDataConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import HistoryEpochs
from gr.data.loader import ResumableLoader
from gr.errors import CheckpointError, ConfigError, DataError

Make = Callable[..., Path]
LANES, BATCH = 8, 16


def loader(
    dataset: Dataset, rank: int = 0, world_size: int = 1, seed: int = 1, batch: int = BATCH, **config
) -> ResumableLoader:
    settings = HistoryDataConfig(path="x", **({"train_holdout": 0, "max_length": 3, "lanes": LANES} | config))
    epochs = HistoryEpochs(dataset, settings, seed=seed, global_batch_size=batch, rank=rank, world_size=world_size)
    return ResumableLoader(epochs)


def users(batch) -> list[int]:
    lengths = batch.features.lengths().tolist()
    return [int(values[0]) - 1 for values in batch.features.values().split(lengths)]


def take(source: ResumableLoader, steps: int) -> list[list[int]]:
    return [users(next(source)) for _ in range(steps)]


def global_batches(dataset: Dataset, world_size: int, steps: int, **options) -> list[list[int]]:
    ranks = []
    for rank in range(world_size):
        with loader(dataset, rank, world_size, **options) as source:
            ranks.append(take(source, steps))
    return [[*chain.from_iterable(parts)] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_same_global_batches_on_every_world_size(dataset: Dataset, world_size: int, shuffle: bool) -> None:
    one = global_batches(dataset, 1, 6, shuffle=shuffle)
    assert global_batches(dataset, world_size, 6, shuffle=shuffle, read_threads=2) == one
    assert all(len(batch) == BATCH for batch in one)


def test_each_example_once_an_epoch(make_folder: Make) -> None:
    dataset = Dataset.open(make_folder([[u + 1, u + 1] for u in range(32)]))
    seen = [*chain.from_iterable(global_batches(dataset, 1, 4))]
    assert sorted(seen[:32]) == sorted(seen[32:]) == list(range(32)) and seen[:32] != seen[32:]


@pytest.mark.parametrize("users", [32, 33, 41])
def test_the_steps_of_epochs_give_each_example_so_often(make_folder: Make, users: int) -> None:
    dataset = Dataset.open(make_folder([[u + 1, u + 1] for u in range(users)]))
    for epochs in (1, 3):
        steps = loader(dataset).steps(epochs)
        times = [[*chain.from_iterable(global_batches(dataset, 1, n))] for n in (steps - 1, steps)]
        assert min(times[1].count(user) for user in range(users)) == epochs
        assert min(times[0].count(user) for user in range(users)) == epochs - 1


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_resume_on_another_world_size(dataset: Dataset, world_size: int) -> None:
    whole = global_batches(dataset, 1, 7)
    with loader(dataset, 0, 4) as source:
        take(source, 3)
        state = source.state_dict()
    assert state["position"] == 3 * BATCH // LANES
    ranks = []
    for rank in range(world_size):
        with loader(dataset, rank, world_size) as resumed:
            resumed.load_state_dict(state)
            ranks.append([next(resumed) for _ in range(4)])
    assert [[*chain.from_iterable(map(users, parts))] for parts in zip(*ranks, strict=True)] == whole[3:]
    assert [batch.first_example for batch in ranks[0]] == [BATCH * step for step in range(3, 7)]


def test_load_state_after_start_discards_what_was_prefetched(dataset: Dataset) -> None:
    with loader(dataset) as source:
        start = source.state_dict()
        first = take(source, 3)
        source.load_state_dict(start)
        assert take(source, 3) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 4}, "lanes=8, this run has lanes=4"),
        ({"seed": 2}, "seed=1, this run has seed=2"),
        ({"shuffle": False}, "shuffle=1, this run has shuffle=0"),
    ],
)
def test_another_order_is_refused(dataset: Dataset, change: dict, message: str) -> None:
    state = loader(dataset).state_dict()
    with pytest.raises(CheckpointError, match=message):
        loader(dataset, **change).load_state_dict(state)


def test_other_rows_are_refused(dataset: Dataset) -> None:
    state = loader(dataset).state_dict()
    with pytest.raises(CheckpointError, match="rows=36, this run has rows=37"):
        loader(dataset).load_state_dict(state | {"rows": 36})
    with pytest.raises(CheckpointError, match="row_groups=7"):
        loader(dataset).load_state_dict(state | {"row_groups": 7})


@pytest.mark.parametrize("place", [None, "1", 1.0, True, [1]])
def test_a_place_that_is_none_is_refused(dataset: Dataset, place: object) -> None:
    state = loader(dataset).state_dict()
    for wrong in (state | {"position": place}, {name: value for name, value in state.items() if name != "position"}):
        with pytest.raises(CheckpointError, match=r"has position=.*, no place to continue from; remove the ch"):
            loader(dataset).load_state_dict(wrong)


def test_configuration_errors(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=8 is not divisible by the world size 3"):
        loader(dataset, 0, 3)
    with pytest.raises(ConfigError, match=r"global_batch_size=12 is not divisible by data\.lanes=8"):
        loader(dataset, batch=12)


def test_an_error_in_a_thread_reaches_the_consumer(make_folder: Make) -> None:
    rows = [[1, 2, 3]] * 16
    rows[13] = [1, 99, 3]
    source = loader(Dataset.open(make_folder(rows)))
    for _ in range(2):  # and again
        with pytest.raises(
            DataError, match=r"part-00001\.parquet: row group 1, row 1, column item_ids: element 1 is item id 99"
        ):
            next(source)
    source.close()


def test_counters_and_skipped_rows(make_folder: Make) -> None:
    rows = [[1, 2, 3, 4, 5]] * 14 + [[1], [99, 1]]
    with loader(Dataset.open(make_folder(rows)), on_bad_row="skip") as source:
        batch = next(source)
        assert batch.features.stride() == BATCH
        assert sorted(batch.features.lengths().tolist()) == [0, 0] + [3] * 14
        counted = source.counters()
        assert (counted["bad_rows"], counted["truncated_tokens"], counted["examples_without_target"]) == (1, 14, 2)
        assert source.wait_seconds > 0.0
        next(source)
        assert source.counters()["truncated_tokens"] == 28  # handed out, not collated ahead


def test_an_error_is_forgotten_when_a_state_is_loaded(make_folder: Make) -> None:
    rows = [[1, 2, 3]] * 16
    rows[3] = [1, 99, 3]
    with loader(Dataset.open(make_folder(rows)), batch=8, shuffle=False) as source:
        for _ in range(2):
            with pytest.raises(DataError, match="item id 99"):
                next(source)
        source.load_state_dict(source.state_dict() | {"position": 1})
        assert len(users(next(source))) == 8 and source.state_dict()["position"] == 2


def test_an_endless_loader_has_no_length(dataset: Dataset) -> None:
    with loader(dataset) as source, pytest.raises(TypeError, match="HistoryEpochs is endless"):
        len(source)


def test_close_ends_the_threads(dataset: Dataset) -> None:
    before = threading.active_count()
    source = loader(dataset, prefetch=1, read_threads=2)
    next(source)
    source.close()
    source.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(source)


@pytest.mark.data
def test_movielens_100k(test_data: Path, tmp_path: Path) -> None:
    from gr.prepare.movielens import prepare_movielens
    from gr.prepare.source import Source

    prepare_movielens("movielens-100k", Source(test_data / "ml-100k"), tmp_path)
    dataset = Dataset.open(tmp_path)
    with loader(dataset, batch=128, world_size=1, max_length=200) as source:
        tokens = np.mean([len(next(source).target_ids_T) for _ in range(8)])
    assert dataset.corpus()[0].tolist() == list(range(1, 1683)) and 9_000 < tokens < 14_000

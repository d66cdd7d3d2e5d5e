"""A stream: every event once, in the order of time, the same at any world size and after resuming."""

from pathlib import Path

import numpy as np
import pytest

from gr.batch import ITEM_FEATURE, RankingBatch
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset
from gr.data.loader import ResumableLoader
from gr.data.time_windows import WindowPass, read_windows
from gr.errors import CheckpointError, ConfigError, DataError
from gr.schema import DataSchema
from tests.support.tiny_histories import tiny_ranking_config, write_histories

WINDOWS, G = 4, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 users, so more than one row group."""
    made = tmp_path_factory.mktemp("stream")
    write_histories(made, users=700)
    return made


def loader(folder: Path, *, rank: int = 0, world_size: int = 1, size: int = G, **data: object) -> ResumableLoader:
    dataset = Dataset.open(folder)
    given = {"path": str(folder), "max_length": 30, "train_holdout": 0, "stream": {"windows": WINDOWS}, **data}
    config = tiny_ranking_config(data=given)
    collate = RankingCollate(dataset.schema, config.data, config.task)
    return ResumableLoader(
        WindowPass(dataset, config.data, collate, global_batch_size=size, rank=rank, world_size=world_size)
    )


def predicted(batch: RankingBatch) -> list[tuple[int, int, int]]:
    """(user, item, time) of the predicted events of a batch."""
    assert batch.timestamps_T is not None
    stop = np.cumsum(batch.features[ITEM_FEATURE].lengths().numpy())
    found = []
    for example, (end, scored) in enumerate(zip(stop, batch.scored_B.tolist(), strict=True)):
        for place in range(end - scored, end):
            item, time = int(batch.features[ITEM_FEATURE].values()[place]), int(batch.timestamps_T[place])
            found.append((int(batch.user_B[example]), item, time))
    return found


def events(folder: Path) -> list[tuple[int, int, int]]:
    dataset, found = Dataset.open(folder), []
    assert len(dataset.row_groups) > 1
    for group in range(len(dataset.row_groups)):
        rows = dataset.read_row_group(group, ["user_id", "timestamps"])
        users = np.repeat(rows.columns["user_id"], rows.lengths_B)
        found += list(
            zip(users.tolist(), rows.columns["item_ids"].tolist(), rows.columns["timestamps"].tolist(), strict=True)
        )
    return found


def test_every_event_once_and_windows_in_order(folder: Path) -> None:
    source = loader(folder)
    bounds = read_windows(Dataset.open(folder), WINDOWS, "fail")[0]
    found, window = [], -1
    for step, batch in enumerate(source):
        starting = source.source.starting_window(step)
        window = window if starting is None else starting
        mine = predicted(batch)
        assert all(bounds[window] <= time < bounds[window + 1] for _, _, time in mine)
        assert len({user for user, _, _ in mine}) == int((batch.scored_B > 0).sum())
        found += mine
    assert window == WINDOWS - 1 and step + 1 == len(source)
    assert sorted(found) == sorted(events(folder)) and len(found) > 5000
    assert source.counters() == {"bad_rows": 0, "truncated_tokens": 0, "unpredicted": 0}


def test_a_window_is_what_training_will_read(folder: Path) -> None:
    source = loader(folder)
    trained = {window: [] for window in range(WINDOWS)}
    window = 0
    for step in range(len(source)):
        starting = source.source.starting_window(step)
        window = window if starting is None else starting
        trained[window] += predicted(next(source))
    for window, expected in trained.items():
        assert [event for batch in source.source.window(window) for event in predicted(batch)] == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_batches(folder: Path, world_size: int) -> None:
    ranks = [loader(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(loader(folder), *ranks, strict=True):
        assert predicted(whole) == [event for part in parts for event in predicted(part)]
        assert all(len(part.user_B) == G // world_size for part in parts)
        assert {part.first_example for part in parts} == {whole.first_example}


def test_resumes_inside_a_window_on_other_ranks(folder: Path) -> None:
    source = loader(folder)
    whole = [predicted(batch) for batch in loader(folder)]
    for _ in range(40):
        next(source)
    state = source.state_dict()
    source.close()
    for size in (1, 2):
        again = [loader(folder, rank=rank, world_size=size) for rank in range(size)]
        for each in again:
            each.load_state_dict(state)
        rest = [[event for part in parts for event in predicted(part)] for parts in zip(*again, strict=True)]
        assert rest == whole[40:]


def test_a_closed_stream_ends(folder: Path) -> None:
    with loader(folder) as source:
        next(source)
    with pytest.raises(StopIteration):
        next(source)
    assert source.state_dict()["step"] == 1


def test_long_histories_lose_their_oldest_and_it_is_counted(folder: Path) -> None:
    source = loader(folder, max_length=5, stream={"windows": 1}, candidates=1)
    source_events = [event for batch in source for event in predicted(batch)]
    by_user: dict[int, list[int]] = {}
    for user, _, time in events(folder):
        by_user.setdefault(user, []).append(time)
    assert len(source_events) == sum(min(5, len(times)) for times in by_user.values())
    assert all(time in by_user[user][-5:] for user, _, time in source_events)
    assert source.counters()["unpredicted"] == sum(max(0, len(times) - 5) for times in by_user.values())


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.global_batch_size=12 is not divisible by the world size 5"):
        loader(folder, world_size=5)
    state = loader(folder).state_dict()
    with pytest.raises(CheckpointError, match="stream has global_batch_size=12, this run has global_batch_size=24"):
        loader(folder, size=24).load_state_dict(state)
    with pytest.raises(CheckpointError, match="windows=4, this run has windows=2"):
        loader(folder, stream={"windows": 2}).load_state_dict(state)
    write_histories(tmp_path, users=20, longest=0)
    assert DataSchema.load(tmp_path).events == 0
    with pytest.raises(DataError, match="has no events to stream"):
        loader(tmp_path)

"""`gr prepare kuairand-1k` and `-27k` on generated files of the published layout.

Layout: the README of github.com/chongminggao/KuaiRand. The real files are not among the test data.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.cli.prepare import command
from gr.config.histories import HistoryDataConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import HistoryEpochs
from gr.data.loader import ResumableLoader
from gr.errors import DataError
from gr.prepare import partition
from gr.prepare.kuairand import ACTIONS, USER_FEATURES
from tests.support.history_folder import histories_by_user

COLUMNS = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USER_COLUMNS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{n}" for n in range(18))
)
LOGS = {
    "1k": ["standard_4_08_to_4_21_1k", "standard_4_22_to_5_08_1k", "random_4_22_to_5_08_1k"],
    "27k": [
        "standard_4_08_to_4_21_27k_part1",
        "standard_4_08_to_4_21_27k_part2",
        "standard_4_22_to_5_08_27k_part1",
        "standard_4_22_to_5_08_27k_part2",
        "random_4_22_to_5_08_27k",
    ],
}
T0 = 1650485801301


def event(user: int, video: int, time: int, *, click: int = 0, view: int = 0, play: int = 0, rand: int = 0) -> str:
    """A line as in the README's example; tab is video % 15, the video lasts 10 seconds."""
    return f"{user},{video},20220421,400,{T0 + time},{click},0,0,0,0,0,{view},{play},10000,0,0,0,{rand},{video % 15}"


def user(number: int, degree: str = "full_active", range_: str = "(0,10]", encrypted: str = "3.0") -> str:
    flags, days = "0,0,1", "3624,730+"
    return f'{number},{degree},{flags},5,"{range_}",312,"[100,1k)",0,0,{days},' + ",".join([encrypted] * 18)


def put(folder: Path, logs: Sequence[Sequence[str]], users: Sequence[str], size: str = "1k") -> Path:
    """The unpacked archive: all files are in data/."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(LOGS[size], logs, strict=True):
        (data / f"log_{name}.csv").write_text("\n".join([COLUMNS, *lines]) + "\n")
    (data / f"user_features_{size}.csv").write_text("\n".join([USER_COLUMNS, *users]) + "\n")
    return folder


def prepare(source: Path, out: Path, *more: str, size: str = "1k") -> Result:
    return CliRunner().invoke(command, [f"kuairand-{size}", "--source", str(source), "--out", str(out), *more])


FIRST = [event(7, 3, 500, click=1, play=2500), event(0, 0, 300), event(7, 9, 100, view=1, play=25000)]
SECOND = [event(7, 4, 500), event(2, 5, 50)]
RANDOM = [event(7, 6, 400, rand=1)]
USERS = [user(7, "high_active", "500+", ""), user(0), user(2, encrypted="11"), user(9)]


def test_events_of_all_logs_in_order_of_time(tmp_path: Path) -> None:
    source = put(tmp_path / "KuaiRand-1K", [FIRST, SECOND, RANDOM], USERS)
    result = prepare(source, tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert "3 users, 6 events, 6 candidate items" in result.output
    schema, histories = Dataset.open(tmp_path / "out").schema, histories_by_user(tmp_path / "out")
    assert (schema.time_unit, schema.actions, schema.values) == ("ms", list(ACTIONS), ["watch_fraction"])
    assert schema.event_features == {"tab": 16, "exposure": 3} and schema.contextual["user"] == 11
    assert "item id = video_id + 1" in schema.source and "ties in the order of the files" in schema.order
    mine = histories[7]
    assert mine["item_ids"] == [10, 7, 4, 5], "the tie at 500 is in the order of the files"
    assert mine["actions"] == [1 << ACTIONS.index("long_view"), 0, 1 << ACTIONS.index("is_click"), 0]
    assert mine["watch_fraction"] == [2.5, 0.0, 0.25, 0.0], "a loop is more than the whole"
    assert mine["tab"] == [10, 7, 4, 5] and mine["exposure"] == [1, 2, 1, 1]
    assert (mine["user"], histories[0]["user"]) == (8, 1)
    assert histories[0]["item_ids"] == [1], "video 0 is an item, and not padding"
    assert [histories[n]["user_active_degree"] for n in (0, 2, 7)] == [1, 1, 2], (
        "ids by order: full_active, high_active"
    )
    assert [histories[n]["onehot_feat3"] for n in (0, 2, 7)] == [1, 2, 0], "3.0 is before 11, and empty is 0"
    assert list(schema.contextual)[1:] == list(USER_FEATURES)


def test_the_large_one_has_its_own_files(tmp_path: Path) -> None:
    source = put(tmp_path / "KuaiRand-27K", [FIRST, [], SECOND, [], RANDOM], USERS, size="27k")
    assert prepare(source, tmp_path / "large", size="27k").exit_code == 0
    assert prepare(put(tmp_path / "s", [FIRST, SECOND, RANDOM], USERS), tmp_path / "small").exit_code == 0
    assert histories_by_user(tmp_path / "large") == histories_by_user(tmp_path / "small")
    assert Dataset.open(tmp_path / "large").schema.name == "kuairand-27k"


def test_no_event_is_left_out_for_want_of_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = put(tmp_path / "k", [FIRST, SECOND, RANDOM], USERS[:1])
    assert prepare(source, tmp_path / "out").exit_code == 0
    histories = histories_by_user(tmp_path / "out")
    assert sorted(histories) == [0, 2, 7] and histories[2]["onehot_feat3"] == histories[2]["user_active_degree"] == 0
    assert histories[2]["user"] == 3
    assert (
        "2 users without features" in Dataset.open(tmp_path / "out").schema.source
        and "2 users without features" in caplog.text
    )


def test_videos_of_no_length(tmp_path: Path) -> None:
    lines = [FIRST[0].replace(",10000,", ",0,")]
    assert prepare(put(tmp_path / "k", [lines, SECOND, []], USERS), tmp_path / "out").exit_code == 0
    assert histories_by_user(tmp_path / "out")[7]["watch_fraction"] == [0.0, 0.0]
    assert "1 events of videos of no length, watch_fraction 0" in Dataset.open(tmp_path / "out").schema.source


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (event(7, 3, 1).replace(",400,", ","), "line 4: has 18 fields, wanted 19"),
        ("7,3,20220421,40", "line 4: has 4 fields, wanted 19"),
        (event(7, -3, 1), "line 4, column video_id: is -3, allowed are 0 to"),
        (event(7, 2**31, 1), f"line 4, column video_id: is {2**31}, allowed are 0 to"),
        (event(7, 3, -T0), "line 4, column time_ms: is 0, which is a time in s; write it in ms"),
        (event(7, 3, 1, click=2), "line 4, column is_click: is 2, allowed are 0 to 1"),
        (event(7, 3, 1).removesuffix(",3") + ",15", "line 4, column tab: is 15, allowed are 0 to 14"),
        (event(7, 3, 1, play=-1), "line 4, column play_time_ms: is -1"),
        (event(7, 3, 1).replace("7,3,", "7,x3,"), "line 4, column video_id: 'x3' is not a whole number"),
        (event(7, 3, 1).replace("7,3,", "7,,"), "line 4, column video_id: '' is not a whole number"),
        ("", "line 4: has 1 fields, wanted 19"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, problem: str) -> None:
    source = put(tmp_path / "k", [FIRST, [*SECOND, line, *FIRST], RANDOM], USERS)
    error = prepare(source, tmp_path / "out").exception
    assert isinstance(error, DataError) and f"log_standard_4_22_to_5_08_1k.csv, {problem}" in str(error), error
    assert [path.name for path in tmp_path.iterdir()] == ["k"], "nothing is left behind"


def test_bad_lines_are_left_out_and_counted_when_asked(tmp_path: Path) -> None:
    bad = ["7,3", event(7, 3, 1, click=2), event(7, 3, 1).replace("7,3,", "7,x3,"), event(7, -1, 1, click=2), ""]
    source = put(tmp_path / "k", [FIRST, [bad[0], *SECOND, *bad[1:]], RANDOM], USERS)
    assert prepare(source, tmp_path / "out").exit_code == 1
    result = prepare(source, tmp_path / "out", "--on-bad-row", "skip")
    assert result.exit_code == 0, result.exception
    assert "4 bad events left out: (fields) 1, is_click 1, video_id 2" in result.output
    assert prepare(put(tmp_path / "good", [FIRST, SECOND, RANDOM], USERS), tmp_path / "wanted").exit_code == 0
    assert histories_by_user(tmp_path / "out") == histories_by_user(tmp_path / "wanted")


def test_missing_columns_and_files(tmp_path: Path) -> None:
    source = put(tmp_path / "k", [FIRST, SECOND, RANDOM], USERS)
    file = source / "data" / "log_random_4_22_to_5_08_1k.csv"
    whole = file.read_text()
    file.write_text(whole.replace("long_view", "longview"))
    error = prepare(source, tmp_path / "out").exception
    assert isinstance(error, DataError) and f"{file}, line 1: has no column long_view; its columns are" in str(error)
    file.unlink()
    error = prepare(source, tmp_path / "out").exception
    assert isinstance(error, DataError) and "has no log_random_4_22_to_5_08_1k.csv; give the unpacked" in str(error)
    file.write_text("")
    assert "line 1: has no column user_id, video_id" in str(prepare(source, tmp_path / "out").exception)
    file.write_text(whole)
    features = source / "data" / "user_features_1k.csv"
    features.write_text(features.read_text() + USERS[0] + "\n")
    assert "user_features_1k.csv: user_id 7 has two lines" in str(prepare(source, tmp_path / "out").exception)
    assert prepare(put(tmp_path / "none", [[], [], []], USERS), tmp_path / "out").exit_code == 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["k", "none"]


LINES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 1), st.integers(0, 30000)), min_size=1, max_size=60
)


@settings(max_examples=25)
@given(LINES, st.randoms(use_true_random=False))
def test_any_order_of_lines_with_distinct_times_gives_the_same_folder(
    lines: list[tuple[int, int, int, int]], random: object
) -> None:
    """And any division over files: the same bytes but for the paths in schema.json."""
    events = [event(u, v, time, click=c, play=p) for time, (u, v, c, p) in enumerate(lines)]
    shuffled = list(events)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cut = len(events) // 3
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, order in (("a", events), ("b", shuffled)):
            source = put(folder / name, [order[:cut], order[cut : 2 * cut], order[2 * cut :]], USERS)
            assert prepare(source, folder / f"{name}-out").exit_code == 0
        contents = [
            {path.name: path.read_bytes() for path in (folder / f"{name}-out").glob("*.parquet")} for name in "ab"
        ]
    assert contents[0] == contents[1]


@pytest.mark.slow
@settings(max_examples=25)
@given(LINES, st.integers(1, 7), st.integers(1, 5))
def test_partitions_and_row_groups_change_no_history(
    lines: list[tuple[int, int, int, int]], per_partition: int, per_group: int
) -> None:
    events = [event(u, v, time % 7, click=c, play=p) for time, (u, v, c, p) in enumerate(lines)]
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        source = put(Path(place) / "k", [events, [], []], USERS)
        assert prepare(source, Path(place) / "one").exit_code == 0
        patch.setattr(partition, "EVENTS_PER_PARTITION", per_partition)
        patch.setattr(partition, "EVENTS_PER_GROUP", per_group)
        assert prepare(source, Path(place) / "many").exit_code == 0
        one, many = histories_by_user(Path(place) / "one"), histories_by_user(Path(place) / "many")
        data = Dataset.open(Path(place) / "many")
        largest = [np.diff(data.read_row_group(i).offsets) for i in range(len(data.row_groups))]
    assert one == many and sum(len(h["item_ids"]) for h in many.values()) == len(events)
    assert all(lengths.sum() <= per_group or len(lengths) == 1 for lengths in largest)


@settings(max_examples=15)
@given(LINES, st.integers(1, 6))
def test_a_window_keeps_the_newest_events(lines: list[tuple[int, int, int, int]], length: int) -> None:
    """The published trainer kept the oldest. All of one user: inputs are the newest before the last one."""
    events = [event(1, video, time) for time, (_, video, _, _) in enumerate(lines)]
    with tempfile.TemporaryDirectory() as place:
        source = put(Path(place) / "k", [list(reversed(events)), [event(1, 77, 1000)], []], USERS)
        assert prepare(source, Path(place) / "out").exit_code == 0
        data = Dataset.open(Path(place) / "out")
        settings_ = HistoryDataConfig(path="x", max_length=length, train_holdout=0, lanes=1)
        epochs = HistoryEpochs(data, settings_, seed=1, global_batch_size=1, rank=0, world_size=1)
        with ResumableLoader(epochs) as loader:
            batch = next(loader)
    items = [video + 1 for _, video, _, _ in lines]
    assert batch.features.values().tolist() == items[-length:]
    assert batch.target_ids_T.tolist() == [*items, 78][-len(items[-length:]) :]
    assert batch.timestamps_T is not None
    assert batch.timestamps_T.tolist() == [(T0 + t) // 1000 for t in range(len(items))][-length:], "seconds of ms"

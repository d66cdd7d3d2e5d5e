"""Generated ratings: what the docstring of gr.prepare.synthetic_ratings promises."""

from pathlib import Path

import numpy as np
import pytest

from gr.cli import main
from gr.data.dataset import Dataset, Histories
from gr.errors import ConfigError
from gr.prepare.synthetic_ratings import RatingOptions, write_ratings

OPTIONS = RatingOptions(users=300, items=800, categories=40, times=8, events=6)


def read(folder: Path) -> Histories:
    dataset = Dataset.open(folder)
    return dataset.read_row_group(0, [*dataset.schema.event_columns, *dataset.schema.user_columns])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Histories:
    folder = tmp_path_factory.mktemp("ratings")
    schema = write_ratings(OPTIONS, folder)
    assert (schema.users, schema.items, schema.event_features) == (300, 800, {"item_category_id": 41})
    return read(folder)


def test_seven_users_of_ten_take_part_at_a_time(written: Histories) -> None:
    assert written.lengths_B.mean() == pytest.approx(0.7 * 8 * 6, rel=0.05)
    assert (written.lengths_B % 6 == 0).all()
    days = (written.columns["timestamps"] - 978_307_200) // 86_400
    assert set(days.tolist()) == set(range(8))


def test_items_appear_with_time_and_users_keep_to_their_categories(written: Histories) -> None:
    days = (written.columns["timestamps"] - 978_307_200) // 86_400
    items, categories = written.columns["item_ids"] - 1, written.columns["item_category_id"]
    assert (categories == items // 20 + 1).all()
    assert (items % 20 < np.maximum(1, 20 * (days + 1) // 8)).all()
    for start, stop in zip(written.offsets[:-1], written.offsets[1:], strict=True):
        assert len(set(categories[start:stop].tolist())) <= 5


def test_actions_follow_the_rating(written: Histories) -> None:
    ratings, actions = written.columns["ratings"], written.columns["actions"]
    assert 1 <= ratings.min() and ratings.max() <= 5
    assert (actions == (ratings > 3) + 2 * (ratings > 4)).all()
    assert 0.4 < (actions & 1).mean() < 0.6


def test_tastes_drift(written: Histories) -> None:
    """3 + 2 cos(pi t / 4 + phase) has the opposite sign four days later: an item the user rated again lost or won."""
    days = (written.columns["timestamps"] - 978_307_200) // 86_400
    user = np.repeat(np.arange(300), written.lengths_B)
    means: dict[tuple[int, int, int], list[float]] = {}
    keys = zip(user, written.columns["item_category_id"], days, written.columns["ratings"], strict=True)
    for u, category, day, rating in keys:
        means.setdefault((int(u), int(category), int(day)), []).append(float(rating))
    pairs = [
        (np.mean(first), np.mean(means[user, category, day + 4]))
        for (user, category, day), first in means.items()
        if (user, category, day + 4) in means
    ]
    assert len(pairs) > 200 and np.corrcoef(np.array(pairs).T)[0, 1] < -0.5


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_ratings(RatingOptions(users=20, items=400, categories=20, seed=seed), tmp_path / name)
    parts = [(tmp_path / name / "part-00000.parquet").read_bytes() for name in "abc"]
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": 4}, "--user-categories 5 is more than --categories 4"),
        ({"items": 1000}, "--items 1000 leaves a category without items at first: give at least 1280"),
        ({"events": 1441}, "more than a day has minutes: 1440 at most"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=message):
        RatingOptions(**options)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["prepare", "streaming", "--out", str(tmp_path / "x"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()

"""Pairs, against a loop over events."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gr.config.preference import ActionLevels, PreferenceTaskConfig
from gr.data.collate import Rows
from gr.data.collate_preference import PreferenceCollate
from gr.data.dataset import Dataset
from gr.data.stochastic_length import Draws
from gr.errors import ConfigError
from tests.support.tiny import tiny_config, write_tiny
from tests.support.tiny_preference import write_rated

WINDOW, REJECTED, DRAWN, HOLDOUT = 6, 2, 3, 2
TASK = {"kind": "preference", "window": WINDOW, "rejected": REJECTED, "drawn": DRAWN, "chosen": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return Dataset.open(write_rated(tmp_path_factory.mktemp("data") / "rated"))


def collate_of(data: Dataset, **task) -> tuple[PreferenceCollate, Rows, Draws]:
    settings = PreferenceTaskConfig.model_validate(TASK | task)
    config = tiny_config(data.path, Path("unused"), data={"path": str(data.path), "max_length": 9})
    collate = PreferenceCollate(data.schema, config.data, settings, data.corpus()[0])
    group = data.read_row_group(0, collate.columns)
    users = np.arange(len(group.lengths_B))
    return collate, Rows([group], np.zeros_like(users), users, True), Draws(3, users)


@pytest.mark.parametrize(
    "task", [{}, {"chosen": 3, "drawn": 0}, {"levels": {"kind": "actions", "order": ("finish", "like")}, "liked": 2}]
)
def test_pairs_are_those_of_a_loop_over_events(data, task):
    collate, rows, draws = collate_of(data, **task)
    batch, _ = collate(rows, draws, 0)
    group, token = rows.groups[0], 0
    corpus = set(data.corpus()[0].tolist())
    for start, stop in zip(group.offsets[:-1], group.offsets[1:] - HOLDOUT, strict=True):
        items = group.columns["item_ids"][start:stop]
        stars = group.columns[collate.level_column][start:stop].tolist()
        level = [(a >= 2) * 1 + (a >= 3) + (a >= 4) + (a >= 5) for a in stars]
        if "levels" in task:
            level = [2 if bits & 2 else bits & 1 for bits in stars]
        for chosen in range(max(1, len(items) - 9), len(items)):
            after = range(chosen + 1, min(chosen + WINDOW, len(items)))
            lower = [j for j in after if level[j] < level[chosen] and items[j] != items[chosen]][:REJECTED]
            lower = lower if level[chosen] >= task.get("chosen", 1) else []
            gaps = batch.gap_TK[token].tolist()
            assert gaps[:REJECTED] == [level[chosen] - level[j] for j in lower] + [0] * (REJECTED - len(lower))
            expected = [int(items[j]) for j in lower] + [0] * (REJECTED - len(lower))
            assert batch.rejected_TK[token, :REJECTED].tolist() == expected
            assert batch.target_ids_T[token] == items[chosen]
            drawn = batch.rejected_TK[token, REJECTED:].tolist()
            assert set(drawn) <= corpus
            assert gaps[REJECTED:] == [max(1, level[chosen]) * (item != items[chosen]) for item in drawn]
            token += 1
    assert token == len(batch.target_ids_T) and (batch.gap_TK[:, 0] > 0).any()


def test_packed_examples_are_the_same(data):
    collate, rows, draws = collate_of(data)
    batch, _ = collate(rows, draws, 0)
    again = batch.unpack(batch.pack())
    for name in ("target_ids_T", "timestamps_T", "query_timestamps_T", "rejected_TK", "gap_TK"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name


def test_what_is_drawn_depends_on_the_example_alone(data):
    collate, rows, draws = collate_of(data)
    whole, _ = collate(rows, draws, 0)
    half = np.arange(40, len(rows.row_B))
    part, _ = collate(Rows(rows.groups, rows.group_B[half], rows.row_B[half], True), Draws(3, draws.number_B[half]), 0)
    assert torch.equal(part.rejected_TK, whole.rejected_TK[-len(part.rejected_TK) :])


def test_held_out_pairs_are_the_two_newest_events(data):
    collate, rows, _ = collate_of(data)
    batch, _ = collate.held_out(rows)
    group = rows.groups[0]
    stop_B = batch.features.lengths().cumsum(0).tolist()
    for start, end, stop in zip(group.offsets[:-1], group.offsets[1:], stop_B, strict=True):
        if end - start < 3:
            continue
        items, stars = group.columns["item_ids"][end - 2 : end], group.columns["ratings"][end - 2 : end]
        differ = stars[0] != stars[1] and items[0] != items[1]
        assert (batch.gap_TK[stop - 1, 0] > 0) == differ
        if differ:
            better = int(stars[1] > stars[0])
            assert batch.target_ids_T[stop - 1] == items[better]
            assert batch.rejected_TK[stop - 1, 0] == items[1 - better]


def test_data_without_what_levels_read_is_refused(data, tmp_path):
    plain = Dataset.open(write_tiny(tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"task\.levels\.kind=ratings, but tiny has no ratings"):
        collate_of(plain)
    with pytest.raises(ConfigError, match="rated has no action buy; it has finish, like"):
        ActionLevels(order=("buy",)).column(data.schema)

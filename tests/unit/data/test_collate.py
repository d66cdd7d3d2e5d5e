"""Batches against a slow definition, written out in Python lists."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.batch import ITEM_FEATURE, RetrievalBatch
from gr.config.histories import HistoryDataConfig
from gr.data.collate import Counts, Rows, collate_evaluation, collate_train
from gr.data.dataset import Histories
from gr.data.stochastic_length import Draws

histories = st.lists(st.lists(st.integers(1, 6), max_size=9), min_size=1, max_size=6)


def make_rows(groups: list[list[list[int]]], picks: list[tuple[int, int]]) -> Rows:
    decoded = []
    for group in groups:
        items = np.array([item for row in group for item in row], dtype=np.int64)
        offsets = np.cumsum([0, *(len(row) for row in group)])
        decoded.append(Histories(offsets, {"item_ids": items, "timestamps": items * 10 + np.arange(len(items))}))
    chosen = np.array(picks, dtype=np.int64).reshape(-1, 2)
    return Rows(decoded, chosen[:, 0], chosen[:, 1], timestamps=True)


def train(
    rows: Rows, *, max_length: int, holdout: int, first_example: int = 0, **options: Any
) -> tuple[RetrievalBatch, Counts]:
    config = HistoryDataConfig(path="unread", max_length=max_length, train_holdout=holdout, **options)
    return collate_train(rows, Draws(1, np.arange(len(rows.row_B))), first_example, config)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[tuple[int, int]], list[list[tuple[int, int]]]]:
    """Groups, picks, and for each pick its events as (item, time)."""
    groups = draw(st.lists(histories, min_size=1, max_size=3))
    places = [(g, r) for g, group in enumerate(groups) for r in range(len(group))] + [(-1, 0)]
    picks = draw(st.lists(st.sampled_from(places), min_size=1, max_size=8))
    events = []
    for g, r in picks:
        if g < 0:
            events.append([])
            continue
        first = sum(map(len, groups[g][:r]))
        events.append([(item, item * 10 + first + i) for i, item in enumerate(groups[g][r])])
    return groups, picks, events


@settings(max_examples=150)
@given(case=drawn(), max_length=st.integers(1, 6), holdout=st.integers(0, 3))
def test_train(case: tuple, max_length: int, holdout: int) -> None:
    groups, picks, events = case
    batch, counts = train(make_rows(groups, picks), max_length=max_length, holdout=holdout, first_example=24)
    lengths, inputs, targets, cut, empty = [], [], [], 0, 0
    for row in events:
        usable = row[: max(len(row) - holdout, 0)]
        cut += max(len(usable[:-1]) - max_length, 0)
        empty += len(usable) < 2
        mine = usable[:-1][-max_length:]
        lengths.append(len(mine))
        inputs += mine
        targets += usable[1:][-max_length:]
    assert batch.features.keys() == [ITEM_FEATURE]
    assert batch.features.stride() == len(picks)
    assert batch.features.lengths().tolist() == lengths
    assert batch.features.values().tolist() == [item for item, _ in inputs]
    assert batch.target_ids_T.tolist() == [item for item, _ in targets]
    assert batch.timestamps_T is not None and batch.query_timestamps_T is not None
    assert batch.timestamps_T.tolist() == [time for _, time in inputs]
    assert batch.query_timestamps_T.tolist() == [time for _, time in targets]
    assert batch.first_example == 24
    assert counts == Counts(cut, empty, tokens=len(inputs))
    assert {batch.features.values().dtype, batch.target_ids_T.dtype, batch.timestamps_T.dtype} == {torch.int64}


@settings(max_examples=150)
@given(
    case=drawn(),
    max_length=st.integers(1, 6),
    from_end=st.sampled_from([1, 2]),
    filter_seen=st.sampled_from(["window", "all", "none"]),
)
def test_evaluation(case: tuple, max_length: int, from_end: int, filter_seen: str) -> None:
    groups, picks, events = case
    batch, counts = collate_evaluation(
        make_rows(groups, picks), max_length=max_length, target_from_end=from_end, filter_seen=filter_seen
    )
    users_without_history = 0
    values, query = batch.features.values().split(batch.features.lengths().tolist()), []
    for i, row in enumerate(events):
        seen = batch.seen_ids[batch.seen_offsets[i] : batch.seen_offsets[i + 1]].tolist()
        before = row[: max(len(row) - from_end, 0)]
        if not before:
            users_without_history += picks[i][0] >= 0
            assert not batch.valid_B[i] and batch.target_ids_B[i] == 0 and seen == [] and len(values[i]) == 0
            continue
        window = before[-max_length:]
        target = row[len(row) - from_end]
        source = {"window": window, "all": before, "none": []}[filter_seen]
        assert batch.valid_B[i] and batch.target_ids_B[i] == target[0]
        assert values[i].tolist() == [item for item, _ in window]
        assert seen == sorted({item for item, _ in source} - {target[0]})
        query += [time for _, time in [*window[1:], target]]
    assert batch.query_timestamps_T is not None and batch.query_timestamps_T.tolist() == query
    assert counts.without_target == users_without_history


def test_event_dropout() -> None:
    """What is left is a history of its own: the target of an input is the input after it. The newest input stays."""
    row = list(range(1, 41))
    rows = make_rows([[row, [1, 2, 3]]] * 1, [(0, 0), (0, 1), (-1, 0)])
    batch, counts = train(rows, max_length=30, holdout=2, event_dropout=0.4)
    lengths = batch.features.lengths().tolist()
    inputs, targets = batch.features.values().tolist(), batch.target_ids_T.tolist()
    assert 8 < lengths[0] < 28 and lengths[1:] == [0, 0] and counts.subsampled_tokens == 30 - lengths[0]
    assert sorted(set(inputs)) == inputs and set(inputs) <= set(row[7:37]), "in order, of the newest 30 of 37"
    assert inputs[-1] == 37 and targets == [*inputs[1:], 38]
    again, _ = train(rows, max_length=30, holdout=2, event_dropout=0.4)
    assert again.features.values().tolist() == inputs


def test_no_timestamps() -> None:
    rows = make_rows([[[1, 2, 3]]], [(0, 0), (-1, 0)])
    rows = Rows(rows.groups, rows.group_B, rows.row_B, timestamps=False)
    batch, _ = train(rows, max_length=5, holdout=0, first_example=0)
    assert batch.timestamps_T is None and batch.query_timestamps_T is None
    assert batch.features.lengths().tolist() == [2, 0]


@pytest.mark.parametrize("from_end", [1, 2])
def test_only_filling_rows(from_end: int) -> None:
    rows = Rows([], np.array([-1, -1]), np.array([0, 0]), timestamps=True)
    batch, counts = collate_evaluation(rows, max_length=3, target_from_end=from_end, filter_seen="all")
    assert batch.features.stride() == 2 and len(batch.features.values()) == 0 and not batch.valid_B.any()
    assert counts == Counts()

"""Dealing examples to ranks: as many each, loads alike, and not a token lost on the way."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gr.batch import RankingBatch, RetrievalBatch
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset
from gr.data.history_batches import HistoryEpochs
from gr.data.loader import ResumableLoader
from gr.dist import World
from gr.parallel.load_balance import LoadBalancer, deal
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_tiny
from tests.support.tiny_histories import tiny_ranking_config, write_histories


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_deal(ranks: int, examples: int, seed: int) -> None:
    """No rank has more than another by more than the last example it was given, which is not the dearest of many."""
    cost_N = np.random.default_rng(seed).lognormal(2, 1.5, examples)
    owner_N = deal(cost_N, ranks)
    load_R = np.bincount(owner_N, cost_N, minlength=ranks)
    assert len(load_R) == ranks
    busiest = int(load_R.argmax())
    if np.count_nonzero(owner_N == busiest) > 1:
        assert load_R[busiest] - cost_N[owner_N == busiest].min() <= load_R.min() * (1 + 1e-12)


def test_empty_examples_go_round() -> None:
    assert deal(np.array([0.0, 0, 7, 0, 0, 0]), 3).tolist() == [1, 2, 0, 1, 2, 1]


def test_a_long_example_is_alone_while_others_are_short() -> None:
    assert deal(np.array([1.0, 2, 9, 3, 1, 1]), 2).tolist() == [1, 1, 0, 1, 1, 1]


def squares(lengths_N: np.ndarray) -> np.ndarray:
    return lengths_N.astype(np.float64) ** 2


def dealt(world: World, make: Callable[[int, int], ResumableLoader], balanced: bool) -> list[Any]:
    """Three batches of each rank; what they hold, since batches do not pass between processes."""
    with make(world.rank, world.size) as loader:
        batches = [next(loader) for _ in range(3)]
    if balanced:
        batches = [LoadBalancer(squares, world)(batch) for batch in batches]
    return [contents(batch) for batch in batches]


def contents(batch: RetrievalBatch | RankingBatch) -> list[dict[str, Any]]:
    """By example: all that the batch has of it."""
    lengths = batch.features["item_id"].lengths().tolist()
    found: list[dict[str, Any]] = [{} for _ in lengths]
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor) and name != "first_token_B":
            parts = (
                value.split(1) if len(value) == len(lengths) and name.endswith(("_B", "_BK")) else value.split(lengths)
            )
            for example, part in zip(found, parts, strict=True):
                example[name] = part.tolist()
    for key, feature in batch.features.to_dict().items():
        for example, part in zip(found, feature.values().split(feature.lengths().tolist()), strict=True):
            example[key] = part.tolist()
    if isinstance(batch, RetrievalBatch) and batch.first_token_B is not None:
        for example, first in zip(found, batch.first_token_B.tolist(), strict=True):
            example["first"] = first
    return found


def retrieval(folder: Path) -> Callable[[int, int], ResumableLoader]:
    config = tiny_config(write_tiny(folder / "tiny"), folder / "unused")
    data = Dataset.open(config.data.path)

    def make(rank: int, size: int) -> ResumableLoader:
        return ResumableLoader(
            HistoryEpochs(data, config.data, seed=1, global_batch_size=16, rank=rank, world_size=size)
        )

    return make


def ranking(folder: Path) -> Callable[[int, int], ResumableLoader]:
    write_histories(folder / "histories")
    config = tiny_ranking_config(folder / "histories")
    data = Dataset.open(config.data.path)
    collate = RankingCollate(data.schema, config.data, config.task)
    epochs = partial(HistoryEpochs, data, config.data, collate, columns=collate.columns, seed=1, global_batch_size=16)

    def make(rank: int, size: int) -> ResumableLoader:
        return ResumableLoader(epochs(rank=rank, world_size=size))

    return make


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", [retrieval, ranking])
def test_every_example_arrives_whole(kind: Callable, ranks: int, tmp_path: Path) -> None:
    """With all that belongs to it; each rank's keep the order of the global batch, and know their place in it."""
    make = kind(tmp_path)
    plain, balanced = (run_ranks(dealt, ranks, make, choice) for choice in (False, True))
    for step in range(3):
        everyone = [example for rank in plain for example in rank[step]]
        length = [len(example["item_id"]) for example in everyone]
        owner = deal(squares(np.array(length)), ranks)
        assert len(set(owner.reshape(ranks, -1)[0])) > 1, "somebody moves"
        if kind is retrieval:
            for example, first in zip(everyone, np.cumsum([0, *length]).tolist(), strict=False):
                example["first"] = first
        for rank in range(ranks):
            assert balanced[rank][step] == [everyone[i] for i in np.flatnonzero(owner == rank)]

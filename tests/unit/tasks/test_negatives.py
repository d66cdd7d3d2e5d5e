"""Candidates: functions of (seed, step, global token), for every kind of negatives."""

from itertools import chain

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec import KeyedJaggedTensor

from gr.batch import RetrievalBatch
from gr.config.retrieval import RetrievalTaskConfig
from gr.dist import World
from gr.errors import DataError
from gr.tasks import Candidates, CandidateSampler
from gr.tasks import negatives as negatives_module
from gr.tasks.negatives import uniform_integers
from tests.support.ranks import run_ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
CORPUS = np.arange(10, 210, 2)
COUNTS = np.arange(100)
TARGETS = [10, 208, 60, 60, 12, 100, 98]
KINDS: list[dict] = [
    {"kind": "per_position", "count": 5},
    {"kind": "per_position", "count": 24},  # more draws than items for the whole batch, fewer for 3 tokens of it
    {"kind": "shared", "count": 6},
    {"kind": "in_batch"},
    {"kind": "full"},
]
by_kind = pytest.mark.parametrize("negatives", KINDS, ids=lambda n: f"{n['kind']}-{n.get('count', '')}")


@pytest.fixture(autouse=True, params=["looked up whole", "by distinct items"])
def corpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small corpora are looked up whole, of others the distinct items of a step."""
    if request.param == "by distinct items":
        monkeypatch.setattr(negatives_module, "SMALL_CORPUS", 0)


def batch_of(targets: list[int]) -> RetrievalBatch:
    values = torch.tensor(targets, dtype=torch.int64)
    features = KeyedJaggedTensor(keys=["item_id"], values=values, lengths=torch.tensor([len(targets)]))
    return RetrievalBatch(features, values, None, None, 0)


def draw(
    negatives: dict, targets: list[int], *, step: int = 3, seed: int = 1, world: World = ALONE, before: int = 0
) -> Candidates:
    sampler = CandidateSampler(RetrievalTaskConfig(negatives=negatives), CORPUS, COUNTS, seed)
    return sampler.draw(batch_of(targets), step, world, before)


def negative_ids(candidates: Candidates) -> Tensor:
    """[T, S] or [S]: the items that the drawn indices stand for."""
    index = candidates.shared_S if candidates.negative_TS is None else candidates.negative_TS
    assert index is not None
    return candidates.ids_K[index]


class TestUniformIntegers:
    @given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 2**63), st.integers(0, 2**33))
    def test_slices_equal_the_whole(self, start: int, count: int, seed: int, step: int) -> None:
        whole = uniform_integers((seed, step), 1000, start=0, count=90)
        assert torch.equal(uniform_integers((seed, step), 1000, start=start, count=count), whole[start : start + count])

    def test_far_slices_too(self) -> None:
        """A large batch of long histories is past 2^32 draws a step only in theory, but it must not wrap."""
        far = uniform_integers((1, 2), 1000, start=2**40 + 3, count=9)
        assert torch.equal(uniform_integers((1, 2), 1000, start=2**40 + 7, count=5), far[4:])
        assert not torch.equal(far, uniform_integers((1, 2), 1000, start=3, count=9))

    @pytest.mark.parametrize("high", [2, 7, 1000])
    def test_uniform(self, high: int) -> None:
        drawn = uniform_integers((5, 6), high, start=11, count=100_000)
        assert scipy.stats.chisquare(torch.bincount(drawn, minlength=high)).pvalue > 1e-6
        pairs = drawn[:-1] * high + drawn[1:]
        if high < 1000:
            assert scipy.stats.chisquare(torch.bincount(pairs, minlength=high**2)).pvalue > 1e-6

    @pytest.mark.parametrize("high", [1, 2, 2**40])
    def test_range(self, high: int) -> None:
        drawn = uniform_integers((1, 1), high, start=0, count=5000)
        assert drawn.dtype == torch.int64 and 0 <= drawn.min() and drawn.max() < high
        assert high == 1 or drawn.max() > 0.99 * (high - 1)

    def test_keys_name_other_streams(self) -> None:
        streams = [uniform_integers(key, 2**40, start=0, count=50) for key in ((1, 2), (2, 1), (1, 3), (0, 2))]
        assert len(torch.cat(streams).unique()) == 200


@by_kind
def test_positives_and_what_is_looked_up(negatives: dict) -> None:
    candidates = draw(negatives, TARGETS)
    assert candidates.ids_K[candidates.positive_T].tolist() == TARGETS
    assert len(candidates.ids_K.unique()) == len(candidates.ids_K)
    assert np.isin(candidates.ids_K, CORPUS).all()


@pytest.mark.parametrize("negatives", [n for n in KINDS if n["kind"] != "in_batch"], ids=str)
def test_parts_of_a_batch_get_what_the_whole_gets(negatives: dict) -> None:
    """As on 2 ranks with 3 and 4 tokens."""
    whole = draw(negatives, TARGETS)
    parts = [draw(negatives, TARGETS[:3]), draw(negatives, TARGETS[3:], before=3)]
    if negatives["kind"] == "full":
        assert all(torch.equal(part.ids_K, whole.ids_K) for part in parts)
    elif negatives["kind"] == "shared":
        assert all(torch.equal(negative_ids(part), negative_ids(whole)) for part in parts)
    else:
        assert torch.equal(torch.cat([negative_ids(part) for part in parts]), negative_ids(whole))


def in_batch(world: World) -> tuple[list, list, list]:
    mine = {3: [TARGETS[:3], [], TARGETS[3:]], 1: [TARGETS]}[world.size][world.rank]
    got = draw({"kind": "in_batch"}, mine, world=world)
    assert got.log_q_K is not None
    return got.ids_K.tolist(), got.ids_K[got.positive_T].tolist(), got.log_q_K.tolist()


def test_in_batch_candidates_are_the_targets_of_all_ranks() -> None:
    (whole,) = run_ranks(in_batch, 1)
    assert whole[0] == [10, 12, 60, 98, 100, 208]
    frequency = np.maximum(COUNTS, 1) / np.maximum(COUNTS, 1).sum()
    at_least_once = 1 - (1 - frequency[(np.array(whole[0]) - 10) // 2]) ** len(TARGETS)
    assert whole[2] == pytest.approx(np.log(at_least_once), rel=1e-6)
    parts = run_ranks(in_batch, 3)
    assert all(part[0] == whole[0] and part[2] == whole[2] for part in parts)
    assert list(chain(*(part[1] for part in parts))) == TARGETS


@pytest.mark.parametrize("count", [5, 24])
def test_per_position_draws_are_the_stream(count: int) -> None:
    expected = CORPUS[uniform_integers((1, 6), 100, start=0, count=len(TARGETS) * count)]
    drawn = negative_ids(draw({"kind": "per_position", "count": count}, TARGETS))
    assert drawn.flatten().tolist() == expected.tolist() and drawn.shape == (len(TARGETS), count)


@pytest.mark.parametrize("kind", ["per_position", "shared"])
def test_steps_and_seeds_draw_anew(kind: str) -> None:
    negatives = {"kind": kind, "count": 50}
    draws = [draw(negatives, TARGETS, step=step, seed=seed) for step, seed in ((3, 1), (3, 1), (4, 1), (3, 2))]
    ids = [negative_ids(each) for each in draws]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2]) and not torch.equal(ids[0], ids[3])


@by_kind
def test_no_tokens(negatives: dict) -> None:
    """A step without a target anywhere: nothing to compare, but something to look up."""
    candidates = draw(negatives, [])
    assert len(candidates.positive_T) == 0
    if negatives["kind"] in ("in_batch", "full"):
        assert len(candidates.ids_K) > 0
    if candidates.log_q_K is not None:
        assert len(candidates.log_q_K) == len(candidates.ids_K)


@pytest.mark.parametrize("stranger", [0, 9, 61, 209, 10**12])
@by_kind
def test_a_target_outside_the_corpus(negatives: dict, stranger: int) -> None:
    with pytest.raises(DataError, match=rf"target item {stranger} is not in the corpus \(items.parquet\)"):
        draw(negatives, [10, stranger, 12])

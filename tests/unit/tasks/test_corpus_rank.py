"""CorpusRanker against a plain ranking: ties, seen items, rows that fill up, uneven slices of the corpus."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from gr.batch import EvaluationBatch
from gr.dist import World
from gr.errors import DataError, TrainingError
from gr.tasks import Cosine, DotProduct, Similarity
from gr.tasks import corpus_rank as ranks
from gr.tasks.corpus_rank import CorpusRanker
from tests.support.ranks import RankError, run_ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
D, QUERIES = 4, 6


@dataclass
class Case:
    """`QUERIES` queries over a corpus of even ids; small integer vectors, so that scores are exact and ties many."""

    corpus: Tensor
    table: Tensor
    queries: Tensor
    targets: list[int]
    seen: list[list[int]]


def make_case(corpus_size: int, seed: int = 0) -> Case:
    random = np.random.default_rng(seed)
    corpus = 2 * np.arange(1, corpus_size + 1)
    targets = random.choice(corpus, QUERIES).tolist()
    seen = [sorted({*random.choice(corpus, corpus_size // 3).tolist()} - {target}) for target in targets]
    seen[2] = []
    return Case(
        torch.from_numpy(corpus),
        torch.from_numpy(random.integers(-1, 2, (2 * corpus_size + 2, D))).float(),
        torch.from_numpy(random.integers(-2, 3, (QUERIES, D))).float(),
        targets,
        seen,
    )


def brute_force(case: Case) -> list[float]:
    out = []
    for query, target, seen in zip(case.queries, case.targets, case.seen, strict=True):
        wanted = float(query @ case.table[target])
        others = [float(query @ case.table[i]) for i in case.corpus.tolist() if i != target and i not in seen]
        out.append(1 + sum(s > wanted for s in others) + sum(s == wanted for s in others) / 2)
    return out


def batch_of(targets: list[int], seen: list[list[int]]) -> EvaluationBatch:
    lengths = torch.zeros(len(targets), dtype=torch.int64)
    nothing = KeyedJaggedTensor(keys=["item_id"], values=torch.empty(0, dtype=torch.int64), lengths=lengths)
    return EvaluationBatch(
        nothing,
        None,
        None,
        target_ids_B=torch.tensor(targets),
        valid_B=torch.tensor(targets) > 0,
        seen_ids=torch.tensor(list(chain(*seen)), dtype=torch.int64),
        seen_offsets=torch.tensor([0, *np.cumsum([len(s) for s in seen])]),
    )


def rank(world: World, case: Case, similarity: Similarity | None = None) -> list[float]:
    """Of this rank's third (or all) of the queries."""
    ranker = CorpusRanker(case.corpus, lambda ids: case.table[ids], similarity or DotProduct(1.0), world)
    size = QUERIES // world.size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    return ranker.ranks(case.queries[mine], batch_of(case.targets[mine], case.seen[mine])).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("corpus_size", [1, 2, 10, 40])
def test_against_brute_force(corpus_size: int, seed: int) -> None:
    case = make_case(corpus_size, seed)
    assert rank(ALONE, case) == brute_force(case)


def test_the_cases_have_ties() -> None:
    assert any(value % 1 for seed in range(5) for value in brute_force(make_case(40, seed)))


@pytest.mark.parametrize("corpus_size", [1, 2, 3, 10, 40])
def test_three_ranks_with_uneven_slices(corpus_size: int) -> None:
    """1 and 2 items are fewer than the ranks: some hold none."""
    case = make_case(corpus_size, seed=1)
    assert list(chain(*run_ranks(rank, 3, case))) == rank(ALONE, case) == brute_force(case)


def test_lookups_and_scores_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(40)
    monkeypatch.setattr(ranks, "LOOKUP_CHUNK", 7)
    monkeypatch.setattr(ranks, "SCORE_BLOCK", 9)
    assert rank(ALONE, case) == brute_force(case)


def test_lookups_are_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose slice ends sooner must look up nothing as often as the others look up something, or they hang."""
    monkeypatch.setattr(ranks, "LOOKUP_CHUNK", 2)
    case, calls = make_case(7), []
    for here in range(3):
        asked: list[int] = []
        CorpusRanker(
            case.corpus,
            lambda ids, asked=asked: (asked.append(len(ids)), case.table[ids])[1],
            DotProduct(1.0),
            World(here, 3, here, 3, torch.device("cpu")),
        )
        calls.append(asked)
    assert [sum(asked) for asked in calls] == [2, 2, 3]
    assert {len(asked) for asked in calls} == {2}


def test_cosine_ignores_the_length_of_items() -> None:
    case = make_case(40, seed=3)
    longer = case.table * 2.0 ** (torch.arange(82) % 3)[:, None]  # powers of two: normalised to the same bits
    stretched = Case(case.corpus, longer, case.queries, case.targets, case.seen)
    assert rank(ALONE, stretched, Cosine(20.0)) == rank(ALONE, case, Cosine(20.0)) != rank(ALONE, stretched)


def test_rows_that_fill_up_do_not_disturb() -> None:
    case = make_case(10)
    expected = brute_force(case)
    case.targets[4], case.seen[4] = 0, []
    got = rank(ALONE, case)
    assert got[:4] + got[5:] == expected[:4] + expected[5:]


def test_seen_items_outside_the_corpus_are_no_candidates_anyway() -> None:
    case = make_case(10)
    expected = brute_force(case)
    case.seen = [[1, *seen, 21] for seen in case.seen]
    assert rank(ALONE, case) == expected


@pytest.mark.parametrize("stranger", [1, 7, 21])
def test_a_target_outside_the_corpus_has_no_rank(stranger: int) -> None:
    """Its score would be taken for 0, and a rank be made up."""
    case = make_case(10)
    case.targets[1] = stranger
    with pytest.raises(DataError, match=rf"target item {stranger} is not in the corpus \(items.parquet\)"):
        rank(ALONE, case)
    with pytest.raises(RankError, match="DataError"):
        run_ranks(rank, 3, case)


def test_a_diverged_model_is_refused_and_not_ranked_first() -> None:
    case = make_case(40, seed=3)
    case.table[4] = torch.nan
    with pytest.raises(TrainingError, match="scores are not finite"):
        rank(ALONE, case)

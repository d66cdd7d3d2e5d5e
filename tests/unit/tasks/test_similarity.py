"""A mixture of logits against its formula, and its two passes against all scores.

T queries, K items, D width, P logits.
"""

from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from gr.config.retrieval import MixtureConfig, RetrievalTaskConfig
from gr.dist import World
from gr.errors import ConfigError, TrainingError
from gr.models.dense import initialise_dense
from gr.tasks import Candidates, Cosine, MixtureOfLogits, build_similarity, require_product, retrieval_loss
from gr.tasks import corpus_rank as ranks
from gr.tasks import losses as task_losses
from gr.tasks import similarity as similarities
from gr.tasks.corpus_rank import CorpusRanker
from tests.support.ranks import run_ranks
from tests.unit.tasks.test_corpus_rank import batch_of

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
D, QUERIES, TEMPERATURE = 6, 6, 0.1


def mixture(seed: int = 0, **fields: float) -> MixtureOfLogits:
    """With weights of a size at which gates are far from even."""
    sizes = {"query_vectors": 3, "item_vectors": 2, "dim": 4, "hidden": 5, "dropout": 0.0}
    built = MixtureOfLogits(MixtureConfig.model_validate(sizes | fields), D, TEMPERATURE).eval()
    random = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    return built


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def formula(own: MixtureOfLogits, query_D: Tensor, item_D: Tensor) -> tuple[Tensor, Tensor]:
    """The score of one pair and its gates, [P], as the docstring has them."""
    n, m = own.config.query_vectors, own.config.item_vectors
    f, g = own.query_vectors(query_D).view(n, -1), own.item_vectors(item_D).view(m, -1)
    logits = torch.stack([F.cosine_similarity(f[i], g[j], dim=0) / TEMPERATURE for i in range(n) for j in range(m)])
    gates = F.silu(own.query_gate(query_D) * own.item_gate(item_D) + own.logit_gate(logits)).softmax(0)
    return gates @ logits, gates


def entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-6).log()).sum(-1)


def brute_force(own: MixtureOfLogits, queries_TD: Tensor, items_KD: Tensor) -> Tensor:
    return torch.stack([torch.stack([formula(own, query, item)[0] for item in items_KD]) for query in queries_TD])


def test_scores_are_the_formula() -> None:
    own, queries, items = mixture(), vectors(3, 1), vectors(5, 2)
    with torch.no_grad():
        expected = brute_force(own, queries, items)
        queries_TC, items_KC = own.queries(queries), own.items(items)
        assert torch.allclose(own.scores(queries_TC, items_KC), expected, rtol=1e-4, atol=1e-4)
        pairs, balance_T = own.pairs(queries_TC, items_KC.expand(3, -1, -1))
        assert torch.allclose(pairs, expected, rtol=1e-4, atol=1e-4)
        gates = torch.stack([formula(own, queries[0], item)[1] for item in items])
        information = float(entropy(gates.mean(0)) - entropy(gates).mean())
        assert balance_T[0] == pytest.approx(-information, abs=1e-5) and information > 0.01


def test_parameters_are_counted() -> None:
    own = mixture()
    assert own.config.parameters(D) == sum(parameter.numel() for parameter in own.parameters())


def test_initial_values_depend_on_the_seed_alone() -> None:
    def weights() -> list[Tensor]:
        with torch.device("meta"):
            own = MixtureOfLogits(MixtureConfig(), D, TEMPERATURE)
        own.to_empty(device="cpu")
        initialise_dense(own, 7)
        return list(own.parameters())

    assert all(torch.equal(*pair) for pair in zip(weights(), weights(), strict=True))


@pytest.mark.parametrize("kind", ["per_position", "shared", "in_batch", "full"])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_the_loss_is_a_softmax_of_scores(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the balance, a token at a time or all at once."""
    monkeypatch.setattr(task_losses, "PAIR_FLOATS", at_once)
    T, K, balance = 4, 7, 0.5
    own, queries, items = mixture(balance=balance), vectors(T, 1).requires_grad_(), vectors(K, 2).requires_grad_()
    positive = torch.tensor([0, 3, 3, 6])
    negative, shared = torch.tensor([[1, 0, 2], [3, 4, 5], [0, 1, 1], [2, 3, 4]]), torch.tensor([2, 3, 5])
    log_q = torch.linspace(-3, -1, K)
    candidates = Candidates(
        torch.arange(K),
        positive,
        negative_TS=negative if kind == "per_position" else None,
        shared_S=shared if kind == "shared" else None,
        log_q_K=log_q if kind == "in_batch" else None,
    )
    scores_TK = brute_force(own, queries, items)
    expected = []
    for t in range(T):
        drawn = {"per_position": negative[t].tolist(), "shared": shared.tolist()}.get(kind)
        compared = list(range(K)) if drawn is None else [int(positive[t]), *drawn]
        gates = torch.stack([formula(own, queries[t], items[k])[1] for k in compared])
        kept = compared if drawn is None else [compared[0], *(k for k in drawn if k != positive[t])]
        logits = scores_TK[t] - log_q if kind == "in_batch" else scores_TK[t]
        entropies = entropy(gates).mean() - entropy(gates.mean(0))
        expected.append(logits[kept].logsumexp(0) - logits[positive[t]] + balance * entropies)
    got = retrieval_loss(queries, items, candidates, own)
    assert torch.allclose(got, torch.stack(expected), rtol=1e-4, atol=1e-4)
    weights = torch.arange(1.0, T + 1)
    inputs = [queries, items, *own.parameters()]
    wanted = torch.autograd.grad((torch.stack(expected) * weights).sum(), inputs)
    for gradient, reference in zip(torch.autograd.grad((got * weights).sum(), inputs), wanted, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-3)


def test_a_rank_without_tokens_has_gradients() -> None:
    own = mixture()
    candidates = Candidates(torch.arange(3), torch.empty(0, dtype=torch.int64))
    loss = retrieval_loss(torch.zeros(0, D), vectors(3, 1), candidates, own)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in own.parameters())


def test_gates_that_are_dropped_leave_weights_that_sum_to_one() -> None:
    own = mixture(dropout=0.5).train()
    with torch.no_grad():
        queries, items = own.queries(vectors(3, 1)), own.items(vectors(50, 2)).expand(3, -1, -1)
        torch.manual_seed(0)
        dropped, _ = own.pairs(queries, items)
        whole, _ = own.eval().pairs(queries, items)
    assert not torch.equal(dropped, whole)
    assert float(dropped.abs().max()) <= 1.001 / TEMPERATURE, "a mean of logits lies between them"


def ranker_of(world: World, own: MixtureOfLogits, corpus: Tensor, table: Tensor) -> CorpusRanker:
    with torch.no_grad():
        return CorpusRanker(corpus, lambda ids: table[ids], own, world)


def top_of(world: World, seed: int, k: int, seen: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """Ids of the k best of this rank's queries, and ranks of targets that the queries have not seen."""
    own, corpus, table, queries = case(seed)
    size = QUERIES // world.size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    batch = batch_of([2] * size, seen[mine])
    ranker = ranker_of(world, own, corpus, table)
    with torch.no_grad():
        ids, _ = ranker.top(own.queries(queries[mine]), batch, k)
        return ids.tolist(), ranker.ranks(own.queries(queries[mine]), batch).tolist()


def case(seed: int) -> tuple[MixtureOfLogits, Tensor, Tensor, Tensor]:
    corpus = 2 * torch.arange(1, 41)
    return mixture(seed), corpus, vectors(82, seed + 10), vectors(QUERIES, seed + 20)


def seen_items(seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[], *([4 + 2 * int(i) for i in random.choice(38, 12, replace=False)] for _ in range(QUERIES - 1))]


def expected_of(seed: int, k: int, seen: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    own, corpus, table, queries = case(seed)
    with torch.no_grad():
        scores = brute_force(own, queries, table[corpus])
    for row, gone in zip(scores, seen, strict=True):
        row[torch.isin(corpus, torch.tensor(gone, dtype=torch.int64))] = -torch.inf
    best = scores.topk(k, dim=1)
    ids = corpus[best.indices].masked_fill(best.values == -torch.inf, 0)
    return ids.tolist(), [1.0 + float((row[1:] > row[0]).sum()) for row in scores]


@pytest.mark.parametrize("block", [7, 1 << 15])
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("seed", range(4))
def test_two_passes_are_brute_force(seed: int, k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SCORE_BLOCK", block)
    monkeypatch.setattr(similarities, "PAIR_FLOATS", 500)
    seen = seen_items(seed)
    assert top_of(ALONE, seed, k, seen) == expected_of(seed, k, seen)


def test_three_ranks() -> None:
    seen = seen_items(1)
    ids, places = zip(*run_ranks(top_of, 3, 1, 5, seen), strict=True)
    assert (list(chain(*ids)), list(chain(*places))) == expected_of(1, 5, seen)


def test_the_first_pass_saves_gates() -> None:
    """Of many pairs the greatest logit is too small, so their gates are never computed."""
    own, corpus, table, queries = case(0)
    with torch.no_grad():
        queries_TC, items_KC = own.queries(queries), own.items(table[corpus])
        nothing = torch.zeros(QUERIES, len(corpus), dtype=torch.bool)
        scored = own.scores(queries_TC, items_KC, own.floor(queries_TC, items_KC, nothing, 1))
    assert QUERIES <= int((scored > -torch.inf).sum()) < 0.8 * QUERIES * len(corpus)


def test_a_diverged_mixture_is_refused() -> None:
    own, corpus, table, queries = case(0)
    table[8] = torch.nan
    ranker = ranker_of(ALONE, own, corpus, table)
    batch = batch_of([2] * QUERIES, [[]] * QUERIES)
    with torch.no_grad(), pytest.raises(TrainingError, match="not finite"):
        ranker.ranks(own.queries(queries), batch)
    with torch.no_grad(), pytest.raises(TrainingError, match="not finite"):
        ranker.top(own.queries(queries), batch, 3)


def test_a_mixture_of_dot_products_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"l2_norm=false, but the logits of similarity\.kind=mol are cosines"):
        RetrievalTaskConfig.model_validate({"similarity": {"kind": "mol"}, "l2_norm": False})


def test_what_needs_products_refuses_a_mixture() -> None:
    task = RetrievalTaskConfig.model_validate({"similarity": {"kind": "mol"}})
    with pytest.raises(ConfigError, match=r"`gr embed` needs scores that are products of two vectors, .*kind=mol"):
        require_product(build_similarity(task, D), "`gr embed`")
    require_product(Cosine(20.0), "`gr embed`")

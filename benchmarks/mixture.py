"""A mixture of logits beside cosine, at the sizes of a step and of an evaluation on Beauty (12,101 items, D 128)."""

import functools
from collections.abc import Callable

import torch

from benchmarks.case import Case, Options
from gr.config.retrieval import MixtureConfig
from gr.ops.top_k import best
from gr.tasks import Candidates, Cosine, MixtureOfLogits, Similarity, retrieval_loss

TESTS = ("tests/unit/tasks/test_similarity.py",)
_TOKENS, _WIDTH, _ITEMS, _NEGATIVES, _SHARED, _USERS, _K = 1_200, 128, 12_101, 128, 512, 64, 100
_SMALL = MixtureConfig(query_vectors=2, item_vectors=2, dim=64, hidden=16)  # as wide as D on either side


def _loss(options: Options, shared: bool) -> Case:
    """Of negatives of each token, which are all items of the corpus, or of some that all tokens share."""
    items = _TOKENS + _SHARED if shared else _ITEMS  # looked up

    @functools.cache
    def inputs() -> tuple[torch.Tensor, torch.Tensor, Candidates]:
        torch.manual_seed(0)
        queries = torch.randn(_TOKENS, _WIDTH, device=options.device, requires_grad=True)
        items_KD = torch.randn(items, _WIDTH, device=options.device, requires_grad=True)
        ids, positive = torch.arange(items), torch.randint(items, (_TOKENS,))
        if shared:
            candidates = Candidates(ids, positive, shared_S=ids[-_SHARED:])
        else:
            candidates = Candidates(ids, positive, negative_TS=torch.randint(items, (_TOKENS, _NEGATIVES)))
        return queries, items_KD, candidates.to(options.device)

    def variant(similarity: Similarity) -> Callable[[], object]:
        def run() -> object:
            queries, items_KD, candidates = inputs()
            loss = retrieval_loss(queries, items_KD, candidates, similarity).sum()
            return torch.autograd.grad(loss, [queries, items_KD])

        return run

    variants = {"cosine": variant(Cosine(20.0))} | {
        f"mixture, {size.query_vectors} x {size.item_vectors} x {size.dim}": variant(
            _mixture(size, options.device).train()
        )
        for size in (MixtureConfig(), _SMALL)
    }
    negatives = f"{_SHARED} shared negatives" if shared else f"{_NEGATIVES} negatives each"
    return Case(f"retrieval loss, T {_TOKENS} D {_WIDTH}, {negatives}", variants, "cosine", rounds=3, warmups=1)


def _top(options: Options) -> Case:
    @functools.cache
    def vectors(similarity: Similarity) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        queries, items = (torch.randn(count, _WIDTH, device=options.device) for count in (_USERS, _ITEMS))
        return similarity.queries(queries) * similarity.scale, similarity.items(items)

    ids = torch.arange(_ITEMS, device=options.device).expand(_USERS, -1)
    mixture = _mixture(MixtureConfig(), options.device).eval()
    nothing = torch.zeros(_USERS, _ITEMS, dtype=torch.bool, device=options.device)

    def one_pass(similarity: Similarity) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            return best(similarity.scores(*vectors(similarity)), ids, _K)

        return run

    @torch.no_grad()
    def two_passes() -> object:
        queries, items = vectors(mixture)
        return best(mixture.scores(queries, items, mixture.floor(queries, items, nothing, _K)), ids, _K)

    variants = {
        "cosine": one_pass(Cosine(20.0)),
        "mixture, all gates": one_pass(mixture),
        "mixture, two passes": two_passes,
    }
    return Case(f"top {_K} of {_ITEMS} items, {_USERS} users", variants, "cosine", rounds=3, warmups=1)


def _mixture(config: MixtureConfig, device: str) -> MixtureOfLogits:
    """With initial values: gates are nearly even, so the bound is at its loosest."""
    torch.manual_seed(0)
    return MixtureOfLogits(config, _WIDTH, 0.05).to(device)


def cases(options: Options) -> list[Case]:
    return [_loss(options, shared=False), _loss(options, shared=True), _top(options)]

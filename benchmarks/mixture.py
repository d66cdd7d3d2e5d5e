"""A mixture of logits beside cosine, at the sizes of a step and of an evaluation on Beauty (12,101 items, D 128)."""

import functools
from collections.abc import Callable

import torch

from benchmarks.case import Case, Options
from gr.config.retrieval import MixtureConfig
from gr.ops.top_k import best
from gr.tasks import Candidates, Cosine, MixtureOfLogits, Similarity, retrieval_loss

TESTS = ("tests/unit/tasks/test_similarity.py",)
_TOKENS, _WIDTH, _ITEMS, _NEGATIVES, _USERS, _K = 1_200, 128, 12_101, 128, 64, 100


def _loss(options: Options) -> Case:
    @functools.cache
    def inputs() -> tuple[torch.Tensor, torch.Tensor, Candidates]:
        torch.manual_seed(0)
        queries = torch.randn(_TOKENS, _WIDTH, device=options.device, requires_grad=True)
        items = torch.randn(_ITEMS, _WIDTH, device=options.device, requires_grad=True)
        positive, negative = (torch.randint(_ITEMS, shape) for shape in ((_TOKENS,), (_TOKENS, _NEGATIVES)))
        return queries, items, Candidates(torch.arange(_ITEMS), positive, negative_TS=negative).to(options.device)

    def variant(similarity: Similarity) -> Callable[[], object]:
        def run() -> object:
            queries, items, candidates = inputs()
            return torch.autograd.grad(retrieval_loss(queries, items, candidates, similarity).sum(), [queries, items])

        return run

    variants = {"cosine": variant(Cosine(20.0)), "mixture, 4 x 4 x 32": variant(_mixture(options.device).train())}
    return Case(f"retrieval loss, T {_TOKENS} S {_NEGATIVES} D {_WIDTH}", variants, "cosine", rounds=3, warmups=1)


def _top(options: Options) -> Case:
    @functools.cache
    def vectors(similarity: Similarity) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        queries, items = (torch.randn(count, _WIDTH, device=options.device) for count in (_USERS, _ITEMS))
        return similarity.queries(queries) * similarity.scale, similarity.items(items)

    ids = torch.arange(_ITEMS, device=options.device).expand(_USERS, -1)
    mixture = _mixture(options.device).eval()
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


@functools.cache
def _mixture(device: str) -> MixtureOfLogits:
    """With initial values: gates are nearly even, so the bound is at its loosest."""
    torch.manual_seed(0)
    return MixtureOfLogits(MixtureConfig(), _WIDTH, 0.05).to(device)


def cases(options: Options) -> list[Case]:
    return [_loss(options), _top(options)]

"""The losses of a MovieLens-1M step, forward and backward: T = 13,700 tokens, K = 3,883 items, D = 50."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.case import Case, Options, on_backend, own_backend
from gr.ops.linear_cross_entropy import linear_cross_entropy
from gr.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from gr.ops.sampled_logits import sampled_logits
from gr.ops.sampled_logits.softmax import sampled_softmax, softmax_of_first

TESTS = ("tests/ops/test_sampled_logits.py", "tests/ops/test_linear_cross_entropy.py")
_TOKENS, _WIDTH, _ITEMS, _NEGATIVES = 13_700, 50, 3883, 128


def _sampled(options: Options) -> Case:
    @functools.cache
    def inputs() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        queries = torch.randn(_TOKENS, _WIDTH, device=options.device, requires_grad=True)
        items = torch.randn(_ITEMS, _WIDTH, device=options.device, requires_grad=True)
        index = torch.randint(0, _ITEMS, (_TOKENS, _NEGATIVES + 1), device=options.device)
        return queries, items, index, torch.randn(_TOKENS, _NEGATIVES + 1, device=options.device)

    def variant(logits: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            queries, items, index, grad = inputs()
            return torch.autograd.grad(logits(queries, items, index), [queries, items], grad)

        return run

    variants = {
        "gather [T, S, D]": variant(lambda q, items, index: torch.einsum("td,tsd->ts", q, items[index])),
        "all items, then gather": variant(lambda q, items, index: (q @ items.T).gather(1, index)),
        "gr without a kernel": on_backend("torch", variant(sampled_logits)),
        f"gr {own_backend(options.device)}": on_backend(own_backend(options.device), variant(sampled_logits)),
    }
    name = f"sampled logits, T {_TOKENS} S {_NEGATIVES + 1} K {_ITEMS} D {_WIDTH}"
    work = 6.0 * _TOKENS * (_NEGATIVES + 1) * _WIDTH
    return Case(name, variants, "gather [T, S, D]", work, rounds=5, memory=True)


def _softmax(options: Options) -> Case:
    """The loss of per-position negatives, from ids to gradients."""

    @functools.cache
    def inputs() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        queries = F.normalize(torch.randn(_TOKENS, _WIDTH, device=options.device)).requires_grad_()
        items = F.normalize(torch.randn(_ITEMS, _WIDTH, device=options.device)).requires_grad_()
        positive = torch.randint(0, _ITEMS, (_TOKENS,), device=options.device)
        return queries, items, positive, torch.randint(0, _ITEMS, (_TOKENS, _NEGATIVES), device=options.device)

    def from_logits(
        queries: torch.Tensor, items: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, scale: float
    ) -> torch.Tensor:
        logits = sampled_logits(queries, items, torch.cat([positive[:, None], negative], dim=1)) * scale
        return softmax_of_first(logits, negative == positive[:, None])

    def variant(losses: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            queries, items, positive, negative = inputs()
            loss = losses(queries, items, positive, negative, scale=20.0).mean()
            return torch.autograd.grad(loss, [queries, items])

        return run

    variants = {"logits, mask, log-sum-exp": variant(from_logits), "gr": variant(sampled_softmax)}
    name = f"sampled softmax, T {_TOKENS} S {_NEGATIVES} K {_ITEMS} D {_WIDTH}"
    work = 6.0 * _TOKENS * (_NEGATIVES + 1) * _WIDTH
    return Case(name, variants, "logits, mask, log-sum-exp", work, memory=True)


def _full(options: Options) -> Case:
    @functools.cache
    def inputs() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        queries = F.normalize(torch.randn(_TOKENS, _WIDTH, device=options.device)).requires_grad_()
        items = F.normalize(torch.randn(_ITEMS, _WIDTH, device=options.device)).requires_grad_()
        return queries, items, torch.randint(0, _ITEMS, (_TOKENS,), device=options.device)

    def variant(losses: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            queries, items, target = inputs()
            return torch.autograd.grad(losses(queries, items, target, scale=20.0).mean(), [queries, items])

        return run

    variants = {
        "F.cross_entropy on [T, K]": variant(linear_cross_entropy_reference),
        "gr": variant(linear_cross_entropy),
    }
    name = f"cross-entropy over all items, T {_TOKENS} K {_ITEMS} D {_WIDTH}"
    return Case(name, variants, "F.cross_entropy on [T, K]", 6.0 * _TOKENS * _ITEMS * _WIDTH, rounds=5, memory=True)


def cases(options: Options) -> list[Case]:
    return [_sampled(options), _softmax(options), _full(options)]

"""The retrieval loss against the formula of each kind of negatives, and what it never allocates.

T tokens, K items, D width, S negatives.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gr.ops.backend import force_backend
from gr.ops.sampled_logits.reference import sampled_logits_reference
from gr.tasks import Candidates, Cosine, DotProduct, Similarity, retrieval_loss

T, K, D, S = 7, 11, 5, 6
KINDS = ("per_position", "shared", "in_batch", "full")
random = torch.Generator().manual_seed(0)
POSITIVE = torch.randint(K, (T,), generator=random)
NEGATIVE = torch.randint(K, (T, S), generator=random)
NEGATIVE[0], NEGATIVE[1, :3] = POSITIVE[0], POSITIVE[1]  # all are hits; some are
SHARED = torch.tensor([3, 0, 3, int(POSITIVE[2]), 9, 1])
LOG_Q = torch.rand(K, generator=random).log()
CANDIDATES = {
    "per_position": Candidates(torch.arange(K), POSITIVE, negative_TS=NEGATIVE),
    "shared": Candidates(torch.arange(K), POSITIVE, shared_S=SHARED),
    "in_batch": Candidates(torch.arange(K), POSITIVE, log_q_K=LOG_Q),
    "full": Candidates(torch.arange(K), POSITIVE),
}


def score(query_D: Tensor, item_D: Tensor, similarity: Similarity) -> Tensor:
    product = query_D @ item_D
    if isinstance(similarity, Cosine):
        product = product / (query_D.norm() * item_D.norm())
    return product * similarity.scale


def formula(queries_TD: Tensor, items_KD: Tensor, kind: str, similarity: Similarity) -> Tensor:
    """-log(e^target / sum of e^candidate), term by term; a negative that is the target is left out of the sum."""
    losses = []
    for t in range(T):
        target = int(POSITIVE[t])
        scores = [score(queries_TD[t], item, similarity) for item in items_KD]
        if kind == "in_batch":
            scores = [value - log_q for value, log_q in zip(scores, LOG_Q.double(), strict=True)]
        drawn = {"per_position": NEGATIVE[t].tolist(), "shared": SHARED.tolist()}.get(kind, range(K))
        compared = [scores[target], *(scores[k] for k in drawn if k != target)]
        losses.append(torch.stack(compared).exp().sum().log() - scores[target])
    return torch.stack(losses)


@pytest.mark.parametrize("similarity", [Cosine(1 / 0.3), DotProduct(0.7)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str, similarity: Similarity) -> None:
    shapes = ((T, D), (K, D))
    exact = [
        torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    fast = [x.detach().float().requires_grad_() for x in exact]
    wanted = formula(exact[0], exact[1], kind, similarity)
    got = retrieval_loss(fast[0], fast[1], CANDIDATES[kind], similarity)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5)
    weights = torch.arange(1.0, T + 1)
    expected = torch.autograd.grad((wanted * weights).sum(), exact)
    for gradient, reference in zip(torch.autograd.grad((got * weights).sum(), fast), expected, strict=True):
        assert torch.allclose(gradient.double(), reference, rtol=1e-4, atol=1e-5)


def test_only_hits_is_no_loss() -> None:
    queries, items = torch.randn(T, D), torch.randn(K, D)
    assert retrieval_loss(queries, items, CANDIDATES["per_position"], Cosine(20.0))[0] == 0.0


def test_a_zero_vector_is_no_nan() -> None:
    """A query of an empty history, or a row that is still zero."""
    queries, items = torch.zeros(T, D, requires_grad=True), torch.zeros(K, D, requires_grad=True)
    for candidates in CANDIDATES.values():
        loss = retrieval_loss(queries, items, candidates, Cosine(20.0))
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.sum(), (queries, items)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str) -> None:
    """A rank without tokens takes part in the step: an empty loss, zero gradients."""
    queries, items = torch.zeros(0, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
    empty = {"positive_T": POSITIVE[:0], "negative_TS": NEGATIVE[:0] if kind == "per_position" else None}
    loss = retrieval_loss(queries, items, Candidates(**{**vars(CANDIDATES[kind]), **empty}), Cosine(20.0))
    assert loss.shape == (0,)
    gradients = torch.autograd.grad(loss.sum(), (queries, items))
    assert gradients[0].shape == (0, D) and (gradients[1] == 0).all()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned, in forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        stored = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *stored])
        return out


class TestMemory:
    T, S, D, K = 2000, 64, 48, 500
    LIMIT = T * S * D // 4

    def candidates(self, kind: str) -> Candidates:
        ids, positive = torch.arange(self.K), torch.randint(self.K, (self.T,))
        options: dict[str, dict[str, Tensor]] = {
            "per_position": {"negative_TS": torch.randint(self.K, (self.T, self.S))},
            "shared": {"shared_S": torch.randint(self.K, (self.S,))},
            "in_batch": {"log_q_K": torch.zeros(self.K)},
            "full": {},
        }
        return Candidates(ids, positive, **options[kind])

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.randn(self.T, self.D, requires_grad=True), torch.randn(self.K, self.D, requires_grad=True)

    @pytest.mark.parametrize("backend", [None, "torch"], ids=["as chosen", "torch"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_no_tensor_of_tokens_by_negatives_by_width(self, kind: str, backend) -> None:
        queries, items = self.tensors()
        with force_backend(backend) if backend else nullcontext(), Largest() as largest:
            retrieval_loss(queries, items, self.candidates(kind), Cosine(20.0)).sum().backward()
        assert queries.grad is not None and items.grad is not None
        assert self.T * self.D <= largest.numel < self.LIMIT

    def test_the_measure_sees_such_a_tensor(self) -> None:
        """In backward alone, too."""
        queries, items = self.tensors()
        index = self.candidates("per_position").negative_TS
        with Largest() as forward:
            logits = sampled_logits_reference(queries, items, index)
        with Largest() as backward:
            logits.sum().backward()
        assert forward.numel == backward.numel == self.T * self.S * self.D

"""Small packed sequences, and the comparison of a tower with a padded definition of it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from gr.sequence import JaggedSequence

D, N = 6, 9


def sequence(
    lengths: Sequence[int], *, dtype: torch.dtype = torch.float64, seed: int = 0, times: bool = True
) -> JaggedSequence:
    """Random vectors of width D; events from seconds to years apart."""
    random = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    timestamps = [torch.empty(0, dtype=torch.int64)] * 2
    for length in lengths:
        gaps = (torch.rand(length + 1, generator=random) * 18).exp().long()
        moments = gaps.cumsum(0)
        timestamps = [torch.cat([timestamps[0], moments[:-1]]), torch.cat([timestamps[1], moments[1:]])]
    return JaggedSequence(
        torch.randn(tokens, D, generator=random, dtype=torch.float64).to(dtype),
        torch.tensor([0, *lengths]).cumsum(0),
        N,
        *(timestamps if times else (None, None)),
    )


def randomised(tower: torch.nn.Module, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Weights of about 0.5, so that no term of the formula is too small to be seen."""
    random = torch.Generator().manual_seed(1)
    for parameter in tower.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.5).to(dtype)
    return tower


def to_padded(values_TD: torch.Tensor, offsets_B1: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [
            torch.nn.functional.pad(values_TD[start:end], (0, 0, 0, N - (end - start)))
            for start, end in pairwise(offsets_B1.tolist())
        ]
    )


def to_packed(x_BND: torch.Tensor, offsets_B1: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:length] for x, length in zip(x_BND, offsets_B1.diff().tolist(), strict=True)])


def check_against(definition: Callable, tower: torch.nn.Module, seq: JaggedSequence, dtype: torch.dtype) -> None:
    """Outputs and every gradient of the tower, relative to the largest value of the definition(tower, sequence)."""
    weights = torch.randn(seq.values_TD.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for run, kind in ((definition, torch.float64), (lambda t, s: t(s).values_TD, dtype)):
        copy = randomised(tower, kind).eval()
        x_TD = seq.values_TD.to(kind).requires_grad_()
        out_TD = run(copy, seq.with_values(x_TD))
        names = [name for name, _ in copy.named_parameters()]
        gradients = torch.autograd.grad((out_TD * weights.to(kind)).sum(), [x_TD, *copy.parameters()])
        results.append({"output": out_TD, **dict(zip(["input", *names], gradients, strict=True))})
    wanted, got = results
    tolerance = 1e-11 if dtype == torch.float64 else 5e-5
    for name, reference in wanted.items():
        error = (got[name].double() - reference).abs().max() / reference.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"

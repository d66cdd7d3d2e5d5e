"""norm_linear: every gradient against the definition in float64."""

from typing import Any

import pytest
import torch

from gr.ops.backend import force_backend
from gr.ops.norm_linear import norm_linear
from gr.ops.norm_linear.reference import Norm, norm_linear_reference
from tests.support.operators import draw, gradients
from tests.support.tolerances import RELATIVE_ERROR, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
@pytest.mark.parametrize(
    ("norm", "size_of_affine", "residual"), [("layer", 3, False), ("rms", 2, True), ("none", 1, True)]
)
def test_matches_definition(
    norm: Norm, size_of_affine: int, residual: bool, silu: bool, affine: bool, dtype: torch.dtype
) -> None:
    inputs = [draw(65, 24, dtype=dtype) + 2, draw(24, 40, dtype=dtype) / 5]
    inputs += [draw(size, dtype=dtype) for size in (40, 24, 24)[:size_of_affine]] if affine else []
    inputs += [draw(65, 40, dtype=dtype)] if residual else []
    grad = draw(65, 40, dtype=dtype)
    values = [x.to(dtype).requires_grad_() for x in inputs]
    names = ("bias_O", "norm_weight_D", "norm_bias_D")
    count = len(inputs) - residual
    named = dict(zip(names, values[2:count], strict=False))
    exact = [x.requires_grad_() for x in inputs]
    exact_named = dict(zip(names, exact[2:count], strict=False))
    if residual:
        named["residual_TO"], exact_named["residual_TO"] = values[-1], exact[-1]
    more: dict[str, Any] = {"eps": 1e-6, "silu": silu, "norm": norm}
    out = torch.cat(norm_linear(*values[:2], **named, **more, splits=[16, 24]), dim=1)
    reference = gradients(norm_linear_reference(*exact[:2], **exact_named, **more), exact, grad)
    # Three products in a row, each rounded: bfloat16 is held to what the definition itself loses in it.
    plain = gradients(norm_linear_reference(*values[:2], **named, **more), values, grad)
    for value, by_definition, expected in zip(gradients(out, values, grad), plain, reference, strict=True):
        allowed = max(RELATIVE_ERROR[dtype], 1.2 * relative_error(by_definition, expected))
        assert relative_error(value, expected) < allowed


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"weight_DO must be \[4, any\], not \[3, 2\]"):
        norm_linear(torch.zeros(5, 4), torch.zeros(3, 2), eps=1e-6, splits=[2])
    with pytest.raises(ValueError, match=r"norm_bias_D must be \[4\]"):
        norm_linear(torch.zeros(5, 4), torch.zeros(4, 2), norm_bias_D=torch.zeros(2), eps=1e-6, splits=[2])
    with pytest.raises(ValueError, match="norm='rms' has no bias"):
        norm_linear(torch.zeros(5, 4), torch.zeros(4, 2), norm_bias_D=torch.zeros(4), eps=1e-6, norm="rms", splits=[2])
    with pytest.raises(ValueError, match=r"splits \[1, 2\] sum to 3; weight_DO has 2 columns"):
        norm_linear(torch.zeros(5, 4), torch.zeros(4, 2), eps=1e-6, splits=[1, 2])


@pytest.mark.parametrize("rows", [0, 1, 64, 1100])
def test_native_blocks_and_tasks(rows: int) -> None:
    """Whole blocks, a last block that is short, and more rows than a task has; the same bits on two threads."""
    with force_backend("native"):
        x, weight, grad = (
            draw(rows, 50, dtype=torch.float32).float() + 2,
            draw(50, 72, dtype=torch.float32).float() / 5,
            draw(rows, 72, dtype=torch.float32).float(),
        )
        inputs = [x.requires_grad_(), weight.requires_grad_()]

        def run() -> list[torch.Tensor]:
            return gradients(torch.cat(norm_linear(*inputs, eps=1e-6, silu=True, splits=[50, 22]), dim=1), inputs, grad)

        values = run()
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - threads if threads < 3 else 1)
        try:
            assert all(torch.equal(one, other) for one, other in zip(values, run(), strict=True))
        finally:
            torch.set_num_threads(threads)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    reference = gradients(norm_linear_reference(*exact, eps=1e-6, silu=True), exact, grad.double())
    for value, expected in zip(values, reference, strict=True):
        assert relative_error(value, expected) < RELATIVE_ERROR[torch.float32]

"""norm_linear: every gradient against the definition in float64."""

import pytest
import torch

from gr.ops.norm_linear import norm_linear
from gr.ops.norm_linear.reference import norm_linear_reference
from tests.support.operators import draw, gradients
from tests.support.tolerances import RELATIVE_ERROR, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
def test_matches_definition(silu: bool, affine: bool, dtype: torch.dtype) -> None:
    inputs = [draw(65, 24, dtype=dtype) + 2, draw(24, 40, dtype=dtype) / 5]
    inputs += [draw(size, dtype=dtype) for size in (40, 24, 24)] if affine else []
    grad = draw(65, 40, dtype=dtype)
    values = [x.to(dtype).requires_grad_() for x in inputs]
    names = ("bias_O", "norm_weight_D", "norm_bias_D")
    out = norm_linear(*values[:2], **dict(zip(names, values[2:], strict=False)), eps=1e-6, silu=silu)
    exact = [x.requires_grad_() for x in inputs]
    reference = gradients(norm_linear_reference(*exact, eps=1e-6, silu=silu), exact, grad)
    # Three products in a row, each rounded: bfloat16 is held to what the definition itself loses in it.
    plain = gradients(norm_linear_reference(*values, eps=1e-6, silu=silu), values, grad)
    for value, by_definition, expected in zip(gradients(out, values, grad), plain, reference, strict=True):
        allowed = max(RELATIVE_ERROR[dtype], 1.2 * relative_error(by_definition, expected))
        assert relative_error(value, expected) < allowed


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"weight_DO must be \[4, any\], not \[3, 2\]"):
        norm_linear(torch.zeros(5, 4), torch.zeros(3, 2), eps=1e-6)
    with pytest.raises(ValueError, match=r"norm_bias_D must be \[4\]"):
        norm_linear(torch.zeros(5, 4), torch.zeros(4, 2), norm_bias_D=torch.zeros(2), eps=1e-6)

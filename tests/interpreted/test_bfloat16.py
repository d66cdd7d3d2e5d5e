"""The changes of conftest.py to the interpreter, alone: the tests of the kernels in bfloat16 rely on them."""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, rounded_ptr, widened_ptr, products_ptr, M: tl.constexpr):
    at = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
    rounded = tl.load(x_ptr + at).to(tl.bfloat16)
    tl.store(rounded_ptr + at, rounded)
    loaded = tl.load(rounded_ptr + at, mask=at >= M, other=0.0)
    tl.store(widened_ptr + at, loaded.to(tl.float32))
    tl.store(products_ptr + at, tl.dot(loaded, tl.trans(loaded)))


def test_bfloat16_is_rounded_loaded_and_multiplied() -> None:
    x = torch.randn(16, 16)
    special = [0.0, -0.0, 1e-40, -3e38, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9, float("inf"), -float("inf")]
    x[0, : len(special)] = torch.tensor(special)
    rounded, widened, products = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16), torch.empty(16, 16)
    kernel[(1,)](x, rounded, widened, products, M=16)
    assert torch.equal(rounded.view(torch.int16), x.bfloat16().view(torch.int16))
    exact = x.bfloat16().float()
    exact[0] = 0  # masked
    assert torch.equal(widened, exact)
    torch.testing.assert_close(products, exact @ exact.T, rtol=1e-6, atol=1e-6)

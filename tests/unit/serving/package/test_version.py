"""Golden rows of keys and values in int8: a last bit may differ, other weights may not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gr.errors import ServingError
from gr.serving.package.version import _compare_golden, golden_name
from gr.serving.package.weights import write_tensors
from gr.serving.passes.cached_rows import stored


def test_golden_rows_of_int8(tmp_path: Path) -> None:
    k_TGQ, v_TGV = torch.randn(20, 2, 4), torch.randn(20, 2, 6)
    golden = {("inputs", k_TGQ), ("outputs", stored(k_TGQ, v_TGV, torch.int8))}
    write_tensors(tmp_path / "golden", {golden_name("prefill", part, 0): tensor for part, tensor in golden})
    manifest: Any = SimpleNamespace(passes={"prefill": SimpleNamespace(inputs=1, outputs=1)}, tolerance=1e-5)

    def prefill(factor: float) -> Any:
        return {"prefill": lambda k_TGQ: [stored(factor * k_TGQ, v_TGV, torch.int8)]}

    for factor in (1.0, 1.0001):
        _compare_golden(tmp_path / "golden", manifest, prefill(factor))
    with pytest.raises(ServingError, match=r"pass prefill is .* from its golden rows"):
        _compare_golden(tmp_path / "golden", manifest, prefill(1.1))

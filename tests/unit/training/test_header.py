"""The first lines of a run's log."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gr.training import header as of_run


def lines(precision: str, device: str, plan: Any = None) -> list[str]:
    trainer = SimpleNamespace(precision=precision, global_batch_size=8)
    config: Any = SimpleNamespace(trainer=trainer, model_phrase="HSTU")
    module: Any = SimpleNamespace(dense={"weight": torch.zeros(3)})
    world: Any = SimpleNamespace(size=1, device=torch.device(device))
    return of_run.header(config, module, plan, world, steps=4, epoch_steps=2)


@pytest.mark.parametrize(("dtype", "warned"), [("fp16", True), ("fp32", False)])
def test_rounding_that_loses_small_updates_is_said(dtype: str, warned: bool) -> None:
    table = SimpleNamespace(name="item_id", rows=2, dim=4, dtype=dtype, rounding="nearest")
    other = SimpleNamespace(name="user_id", rows=2, dim=4, dtype="fp16", rounding="stochastic")
    plan: Any = SimpleNamespace(inventory=SimpleNamespace(tables=(table, other), dense=None), placements=())
    start = "rounding: to nearest, rows of item_id lose every update"
    assert any(line.startswith(start) for line in lines("fp32", "cpu", plan)) == warned


@pytest.mark.parametrize(
    ("has", "precision", "device", "warned"),
    [
        ({}, "bf16", "cpu", True),
        ({"avx512_bf16": True}, "bf16", "cpu", False),
        ({"bf16": True}, "bf16", "cpu", False),
        ({}, "fp32", "cpu", False),
        ({}, "bf16", "cuda", False),
    ],
)
def test_bf16_where_the_cpu_has_none_is_said(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], precision: str, device: str, warned: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert any("set trainer.precision=fp32" in line for line in lines(precision, device)) == warned

"""What fbgemm is told of a table's optimizer, and half-precision tables.

The formulas are compared with torch.optim in tests/distributed/test_parity.py.
"""

from collections.abc import Callable
from typing import Annotated

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from pydantic import TypeAdapter
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from gr.config.optim import TABLE_OPTIMIZERS, TableOptimizerConfig
from gr.config.run import EmbeddingsConfig
from gr.embeddings import TableOptimizer, lookup
from gr.embeddings.optimizers import fused_params


def parse(kind: str, **fields: object) -> TableOptimizerConfig:
    return TypeAdapter(Annotated[TableOptimizerConfig, TABLE_OPTIMIZERS]).validate_python({"kind": kind, **fields})


@pytest.mark.parametrize("kind", TABLE_OPTIMIZERS)
def test_every_registered_optimizer_is_one_of_fbgemm(kind: str) -> None:
    """Its fused type exists, and so does the update of the rows that no kernel fuses."""
    config = parse(kind)
    assert isinstance(fused_params(config)["optimizer"], EmbOptimType)
    assert callable(TABLE_OPTIMIZERS.target(config))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (parse("sgd", lr=0.5), {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.5}),
        (
            parse("rowwise_adagrad", lr=0.5, eps=1e-3),
            {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.5, "eps": 1e-3},
        ),
        (
            parse("adagrad", lr=0.5, eps=1e-3),
            {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.5, "eps": 1e-3},
        ),
        (
            parse("adam", lr=0.5, eps=1e-3, betas=(0.8, 0.7)),
            {"optimizer": EmbOptimType.ADAM, "learning_rate": 0.5, "eps": 1e-3, "beta1": 0.8, "beta2": 0.7},
        ),
        (
            parse("rowwise_adamw", lr=0.5, eps=1e-3, betas=(0.8, 0.7), weight_decay=0.1),
            {
                "optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM,
                "learning_rate": 0.5,
                "eps": 1e-3,
                "beta1": 0.8,
                "beta2": 0.7,
                "weight_decay": 0.1,
            },
        ),
        (
            parse("partial_rowwise_adam", lr=0.5, eps=1e-3, betas=(0.8, 0.7)),
            {
                "optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM,
                "learning_rate": 0.5,
                "eps": 1e-3,
                "beta1": 0.8,
                "beta2": 0.7,
            },
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_fused_params(config: TableOptimizerConfig, expected: dict) -> None:
    assert fused_params(config) == expected


def test_fbgemm_is_told_how_to_round() -> None:
    """Its own default is stochastic, whatever the table."""
    assert "stochastic_rounding" not in fused_params(parse("sgd"))
    for rounding in ("stochastic", "nearest"):
        assert fused_params(parse("sgd"), rounding)["stochastic_rounding"] == (rounding == "stochastic")


def one_step(model: nn.Module, optimizer: TableOptimizer, ids: list[int]) -> None:
    """The gradient of each looked up row is the row number."""
    tables = get_unwrapped_module(model).tables
    history = KeyedJaggedTensor(keys=["item_id"], values=torch.tensor(ids), lengths=torch.tensor([len(ids)]))
    rows, _ = lookup(tables, history, torch.empty(0, dtype=torch.int64), 8)
    (rows * torch.tensor(ids)[:, None] * 1e-4).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
@pytest.mark.parametrize("kind", TABLE_OPTIMIZERS)
def test_half_precision_tables_learn_what_full_ones_do(make_table: Callable, kind: str, sharding: str) -> None:
    """Rows without a gradient must stay: in float16 eps is zero, and 0 / 0 would make them NaN."""
    steps = {}
    for dtype in ("fp32", "fp16"):
        model = make_table(kind=kind, lr=0.05, dtype=dtype, sharding=sharding)
        optimizer = TableOptimizer(model, EmbeddingsConfig(dtype=dtype, optimizer=parse(kind, lr=0.05)), seed=1)
        (shard,), (states,) = optimizer.shards, optimizer.states
        before = shard.weight.float().clone()
        for _ in range(3):
            one_step(model, optimizer, [2, 5, 7, 7])
        assert shard.weight.dtype == (torch.float16 if dtype == "fp16" else torch.float32)
        assert all(state.dtype == torch.float32 for state in states.values())
        steps[dtype] = shard.weight.float() - before
    assert (steps["fp32"][[2, 5, 7]].abs() > 1e-5).all()
    untouched = [row for row in range(12) if row not in (2, 5, 7)]
    assert (steps["fp16"][untouched] == 0).all() and (steps["fp32"][untouched] == 0).all()
    # Three roundings to float16 of weights of at most 0.25.
    assert torch.allclose(steps["fp16"], steps["fp32"], atol=3 * 2**-13, rtol=0)


@pytest.mark.parametrize("kind", TABLE_OPTIMIZERS)
def test_learning_rate_is_what_was_set_last(make_table: Callable, kind: str) -> None:
    """Fused and dense kernels alike: no step at rate 0."""
    model = make_table(kind=kind, lr=0.5)
    optimizer = TableOptimizer(model, EmbeddingsConfig(optimizer=parse(kind, lr=0.5)), seed=1)
    before = optimizer.shards[0].weight.clone()
    optimizer.scale_learning_rates(0.0)
    one_step(model, optimizer, [1, 2])
    assert torch.equal(optimizer.shards[0].weight, before)
    optimizer.scale_learning_rates(1.0)
    one_step(model, optimizer, [1, 2])
    assert not torch.equal(optimizer.shards[0].weight, before)


def test_gradients_do_not_pile_up(make_table: Callable) -> None:
    """The second step of plain SGD is as long as the first."""
    model = make_table(kind="sgd", lr=1.0, sharding="data_parallel")
    optimizer = TableOptimizer(model, EmbeddingsConfig(optimizer=parse("sgd", lr=1.0)), seed=1)
    weight = optimizer.shards[0].weight
    places = [weight.clone()]
    for _ in range(2):
        one_step(model, optimizer, [3])
        places.append(weight.clone())
    assert torch.allclose(places[2] - places[1], places[1] - places[0], atol=1e-7)
    assert torch.allclose((places[1] - places[0])[3], torch.full((8,), -3e-4), atol=1e-7)


def test_set_steps_goes_on_with_the_bias_correction(make_table: Callable) -> None:
    """After many steps nothing is corrected any more: with betas (0, 0.98) the first step is 1 / sqrt(0.02) longer."""
    moved = {}
    for steps in (0, 10_000):
        model = make_table(kind="adam", lr=0.01, betas=(0.0, 0.98))
        optimizer = TableOptimizer(model, EmbeddingsConfig(optimizer=parse("adam", lr=0.01, betas=(0.0, 0.98))), seed=1)
        optimizer.set_steps(steps)
        before = optimizer.shards[0].weight.clone()
        one_step(model, optimizer, [3])
        moved[steps] = (before - optimizer.shards[0].weight)[3]
    assert torch.allclose(moved[0], torch.full((8,), 0.01), rtol=1e-3)
    assert torch.allclose(moved[10_000], torch.full((8,), 0.01 / 0.02**0.5), rtol=1e-3)


@pytest.mark.parametrize(("rounding", "learns"), [("stochastic", True), ("nearest", False)])
def test_small_updates_of_half_precision_tables(make_table: Callable, rounding: str, learns: bool) -> None:
    """Steps of 1e-6 on weights above 2^-6, whose fp16 neighbours are 1.5e-5 apart."""
    model = make_table(kind="sgd", lr=1.0, dtype="fp16", rounding=rounding)
    config = EmbeddingsConfig.model_validate({"dtype": "fp16", "rounding": rounding, "optimizer": {"kind": "sgd"}})
    optimizer = TableOptimizer(model, config, seed=1)
    optimizer.scale_learning_rates(0.01 / config.optimizer.lr)  # a gradient of 1e-4 a step: see one_step
    before = optimizer.shards[0].weight.clone()
    for _ in range(40):
        one_step(model, optimizer, [1])
    wide = before[1].abs() > 2**-6
    assert wide.any() and bool((optimizer.shards[0].weight != before)[1, wide].any()) == learns


@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
def test_a_lookup_without_backward_leaves_nothing(make_table: Callable, sharding: str) -> None:
    """Of an evaluation between steps, and of a loss that was never gone back through."""
    model = make_table(kind="adam", lr=0.1, sharding=sharding)
    optimizer = TableOptimizer(model, EmbeddingsConfig(optimizer=parse("adam", lr=0.1)), seed=1)
    tables, none = get_unwrapped_module(model).tables, torch.empty(0, dtype=torch.int64)
    history = KeyedJaggedTensor(keys=["item_id"], values=torch.tensor([2, 3]), lengths=torch.tensor([2]))
    before = optimizer.shards[0].weight.clone()
    with torch.no_grad():
        lookup(tables, history, none, 8)
    lookup(tables, history, none, 8)
    optimizer.step()
    assert torch.equal(optimizer.shards[0].weight, before)
    one_step(model, optimizer, [5])
    assert (optimizer.shards[0].weight != before).any(1).nonzero().flatten().tolist() == [5]

"""Plans in TorchRec's form: rectangles and places as TorchRec's own constructors give them; wrong models refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ParameterSharding

from gr.config.inventory import TableConfig
from gr.errors import PlanError
from gr.planner.placement import Placement
from gr.planner.sharding_plan import to_sharding_plan
from tests.support.plans import hand_made, machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RANKS, RANKS_PER_HOST = 4, 2
META = torch.device("meta")


class Bags(nn.Module):
    """A model whose one table is in `outer.inner`."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.outer = nn.Module()
        table = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=dim, feature_names=["f"])
        self.outer.inner = EmbeddingBagCollection([table], device=META)


class Sequences(nn.Module):
    def __init__(self, *names: str, dim: int = 8) -> None:
        super().__init__()
        tables = [EmbeddingConfig(name=n, num_embeddings=10, embedding_dim=dim, feature_names=[n]) for n in names]
        self.tables = EmbeddingCollection(tables, device=META)


def converted(placement: Placement, rows: int, dim: int, device: torch.device, **table: object) -> ParameterSharding:
    described = TableConfig.model_validate({"name": "t", "rows": rows, "dim": dim, **table})
    plan = hand_made([described], [placement], machine(RANKS, RANKS_PER_HOST, device.type))
    modules = to_sharding_plan(plan, Bags(rows, dim), device).plan
    assert list(modules) == ["outer.inner"] and list(modules["outer.inner"]) == ["t"]
    return modules["outer.inner"]["t"]


PLACEMENTS: dict[str, tuple[Placement, Callable]] = {
    "data_parallel": (Placement("t", "data_parallel", "dense", (0, 1, 2, 3)), data_parallel),
    "table_wise": (Placement("t", "table_wise", "fused", (3,)), lambda: table_wise(rank=3)),
    "column_wise": (Placement("t", "column_wise", "fused", (3, 1), 128), lambda: column_wise(ranks=[3, 1])),
    "row_wise": (Placement("t", "row_wise", "fused", (0, 1, 2, 3)), row_wise),
    "table_row_wise": (Placement("t", "table_row_wise", "fused", (2, 3)), lambda: table_row_wise(host_index=1)),
    # TorchRec has no constructor for it; its columns are cut like column_wise's.
    "table_column_wise": (Placement("t", "table_column_wise", "fused", (3, 2), 128), lambda: column_wise(ranks=[3, 2])),
    "grid_shard": (
        Placement("t", "grid_shard", "fused", (2, 3, 0, 1), 128),
        lambda: grid_shard(host_indexes=[1, 0]),
    ),
}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("sharding", PLACEMENTS)
@settings(max_examples=15)
@given(rows=st.integers(1, 40))
def test_the_rectangles_are_torchrecs(sharding: str, device: torch.device, rows: int) -> None:
    """It holds with fewer rows than ranks too. TorchRec's grid makes blocks of 128 of the 256 columns."""
    placement, constructor = PLACEMENTS[sharding]
    got = converted(placement, rows, 256, device)
    expected = construct_module_sharding_plan(
        Bags(rows, 256).outer.inner,
        {"t": constructor()},
        EmbeddingBagCollectionSharder(),
        local_size=RANKS_PER_HOST,
        world_size=RANKS,
        device_type=device.type,
    )["t"]
    assert got.sharding_type == sharding and got.ranks == expected.ranks
    assert got.compute_kernel == ("dense" if sharding == "data_parallel" else "fused")
    if sharding == "data_parallel":
        assert got.sharding_spec is None and expected.sharding_spec is None
        return
    assert got.sharding_spec.shards == expected.sharding_spec.shards
    places = [str(shard.placement) for shard in got.sharding_spec.shards]
    device_of = {"cpu": "rank:{0}/cpu", "cuda": "rank:{0}/cuda:{1}"}[device.type]
    assert places == [device_of.format(rank, rank % RANKS_PER_HOST) for rank in placement.ranks]


@pytest.mark.parametrize("kernel", ["dense", "fused", "fused_uvm", "fused_uvm_caching"])
def test_kernels_on_cuda(kernel: str) -> None:
    placement = Placement("t", "table_wise", kernel, (0,))  # type: ignore[arg-type]
    got = converted(placement, 10, 8, CUDA, optimizer="adam", cache_load_factor=0.3)
    assert got.compute_kernel == kernel
    assert (got.cache_params.load_factor if got.cache_params else None) == (0.3 if "caching" in kernel else None)


@pytest.mark.parametrize(
    ("kernel", "optimizer"), [("fused_uvm", "sgd"), ("fused_uvm_caching", "sgd"), ("fused", "adam")]
)
def test_kernels_that_cpu_has_not(kernel: str, optimizer: str) -> None:
    placement = Placement("t", "table_wise", kernel, (0,))  # type: ignore[arg-type]
    said = rf"table t: no kernel {kernel} with {optimizer}, fp32 .* on cpu; make a plan for a cpu"
    with pytest.raises(PlanError, match=said):
        converted(placement, 10, 8, CPU, optimizer=optimizer)


def test_two_collections() -> None:
    """Each table goes to the collection that it lives in."""
    model = nn.ModuleDict({"bags": Bags(10, 8), "sequences": Sequences("s")})
    tables = [
        TableConfig(name="s", rows=10, dim=8, kind="sequence"),
        TableConfig(name="t", rows=10, dim=8),
    ]
    placements = [Placement("s", "row_wise", "fused", (0, 1)), Placement("t", "table_wise", "fused", (1,))]
    plan = to_sharding_plan(hand_made(tables, placements, machine(2)), model, CPU).plan
    assert {path: list(module) for path, module in plan.items()} == {
        "bags.outer.inner": ["t"],
        "sequences.tables": ["s"],
    }


def test_a_plan_of_another_model() -> None:
    def refusal(model: nn.Module, **table: object) -> str:
        described = {"name": "a", "rows": 10, "dim": 8, "kind": "sequence", **table}
        tables = [TableConfig.model_validate(described), TableConfig(name="b", rows=10, dim=8, kind="sequence")]
        placements = [Placement(t.name, "table_wise", "fused", (0,)) for t in tables]
        with pytest.raises(PlanError) as refused:
            to_sharding_plan(hand_made(tables, placements, machine(1)), model, CPU)
        assert str(refused.value).endswith(": make a plan for this model with `gr plan`")
        return str(refused.value).removesuffix(": make a plan for this model with `gr plan`")

    assert refusal(Sequences("a", "c", "d")) == (
        "the model's tables c, d are not in the plan, the plan's table b is not in the model"
    )
    assert refusal(Sequences("a", "b"), rows=11) == (
        "table a of the plan is sequence, 11 x 8; the model's is sequence, 10 x 8"
    )
    assert refusal(Sequences("a", "b"), dim=4) == (
        "table a of the plan is sequence, 10 x 4; the model's is sequence, 10 x 8"
    )
    assert refusal(Sequences("a", "b"), kind="pooled") == (
        "table a of the plan is pooled, 10 x 8; the model's is sequence, 10 x 8"
    )
    many = [f"x{i}" for i in range(9)]
    assert "tables x0, x1, x2, x3, x4 and 4 more are not in the plan" in refusal(Sequences("a", "b", *many))


@pytest.mark.parametrize(("widths", "message"), [((4, 8), "4 (table a) and 8 "), ((12, 4), "12 (table a) and 4 ")])
def test_one_width_of_column_blocks_in_a_sequence_collection(widths: tuple[int, int], message: str) -> None:
    """Pooled tables may differ, and have blocks of several widths: tests/distributed trains with them."""
    tables = [TableConfig(name=name, rows=10, dim=16, kind="sequence") for name in "ab"]
    placements = [
        Placement(name, "column_wise", "fused", tuple(range(-(-16 // width))), width)
        for name, width in zip("ab", widths, strict=True)
    ]
    with pytest.raises(PlanError, match="takes one width: let one of them be row_wise or table_wise") as refused:
        to_sharding_plan(hand_made(tables, placements, machine(4)), Sequences("a", "b", dim=16), CPU)
    assert str(refused.value).startswith(f"tables: column blocks of {message}")

"""Vectors and gradients that travel in fewer bytes: what is sent, counted on the wire, and what it does to training."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gr.config.inventory import CommDtype
from gr.config.retrieval import RetrievalConfig
from gr.dist import World
from gr.errors import PlanError
from gr.experiment import build
from gr.planner.constraints import constrained
from gr.planner.estimate_tables import COMM_BYTES, volume
from gr.planner.plan import search
from gr.recipes.base import open_recipe
from gr.training.module import TrainModule
from tests.distributed.test_parity import loader_for
from tests.support.plans import machine
from tests.support.ranks import run_ranks
from tests.support.schemas import item_schema
from tests.support.tiny import ITEMS, tiny_config, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", users=6400)


def configured(folder: Path, forward: str, backward: str, sharding: str = "row_wise", dim: int = 32) -> RetrievalConfig:
    return tiny_config(
        folder,
        folder / "unused",
        model={"dim": dim},
        planner={
            "sharding": sharding,
            "allow_state_per_shard": True,
            "comm_dtype": {"forward": forward, "backward": backward},
        },
        trainer={"global_batch_size": 32},
        embeddings={"optimizer": {"kind": "adam", "lr": 1e-3}},
    )


def trained(world: World, config: RetrievalConfig, steps: int) -> tuple[list[float], int]:
    """(loss of each step, bytes of vectors and gradients that this rank gave to all-to-alls)."""
    built = build(open_recipe(config), world)
    module = TrainModule(built.model, built.recipe.objective(world), config, world)
    sent, plain = 0, dist.all_to_all_single

    def counted(output: torch.Tensor, input: torch.Tensor, *rest, **named):
        nonlocal sent
        if input.dtype not in (torch.int64, torch.int32):
            sent += input.nbytes
        return plain(output, input, *rest, **named)

    dist.all_to_all_single = counted
    loader, losses = loader_for(config, world), []
    for step in range(steps):
        loss = module.forward(module.prepare(next(loader), step))
        losses.append(world.all_reduce_sum([float(loss.total)])[0] / loss.tokens)
        module.backward(loss, step)
    loader.close()
    dist.all_to_all_single = plain
    return losses, sent


def run(config: RetrievalConfig, steps: int, ranks: int = 2) -> tuple[list[float], int]:
    outcomes = run_ranks(trained, ranks, config, steps)
    return outcomes[0][0], sum(sent for _, sent in outcomes)


@pytest.mark.slow
def test_bf16_halves_the_bytes_and_keeps_the_losses(folder):
    """60 steps; the loss falls by more than a nat meanwhile."""
    (wide, sent), (narrow, halved) = (run(configured(folder, dtype, dtype), 60) for dtype in ("fp32", "bf16"))
    assert halved * 2 == sent > 0
    assert wide[-1] < wide[0] - 1
    assert max(abs(a / b - 1) for a, b in zip(narrow, wide, strict=True)) < 1e-3


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize(("forward", "backward"), [("fp16", "fp32"), ("int8", "bf16"), ("int8", "int8")])
def test_each_way_has_its_own_type(folder, forward, backward, sharding):
    steps = 4
    # Column shards of 32 are the least that int8 takes.
    (wide, sent), (losses, less) = (
        run(configured(folder, *dtypes, sharding, dim=64), steps) for dtypes in (("fp32", "fp32"), (forward, backward))
    )
    # As many vectors come as gradients go back.
    assert less == sent * (COMM_BYTES[forward] + COMM_BYTES[backward]) / (2 * COMM_BYTES["fp32"])
    assert losses == pytest.approx(wide, rel=2e-3)


def test_index_dedup_sends_each_row_once_as_planned(folder):
    """All 60 items are candidates, so a rank asks for each once, with and without users whose histories repeat them."""
    config = configured(folder, "fp32", "fp32")
    each_id = config.model_copy(update={"planner": config.planner.model_copy(update={"index_dedup": False})})
    (losses, more), (expected, sent) = (run(each, 4) for each in (each_id, config))
    assert losses == pytest.approx(expected, abs=1e-6)
    predicted = volume(config.inventory(item_schema(ITEMS)), 2)
    there_and_back = 2 * 4 * COMM_BYTES["fp32"]
    assert sent == pytest.approx(float((predicted.outputs * predicted.dim).sum()) * there_and_back, rel=0.02)
    assert sent < 0.5 * more


def test_one_rank_sends_nothing_and_converts_nothing(folder):
    plain, converted = (run(configured(folder, dtype, dtype), 2, ranks=1)[0] for dtype in ("fp32", "bf16"))
    assert plain == converted


class TestRefusals:
    def test_sums_of_int8(self):
        fault = CommDtype(forward="int8").fault("pooled", "row_wise", 64)
        assert fault == "row_wise adds vectors up on the way, which comm_dtype int8 cannot; use fp16 or bf16"
        assert CommDtype(forward="int8").fault("sequence", "row_wise", 64) is None
        assert CommDtype(forward="bf16").fault("pooled", "row_wise", 64) is None

    def test_narrow_shards(self, folder):
        config = configured(folder, "int8", "fp32")
        with pytest.raises(PlanError, match="shards of a multiple of 32 columns, not 8"):
            narrow = config.model_copy(update={"model": config.model.model_copy(update={"dim": 8})})
            search(constrained(narrow.inventory(item_schema(ITEMS)), narrow.planner, "cpu"), machine(2))

"""Groups of ranks, each with a copy of the tables (2D): with SGD and a mean a step they train as one group does."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gr.checkpoint import CheckpointFolder
from gr.dist import World
from gr.embeddings import TableOptimizer
from gr.experiment import build, evaluate
from gr.ops.row_update import StochasticRounding
from gr.parallel.groups import TableCopies
from gr.planner.estimate import MEMORY, estimate
from gr.recipes.base import open_recipe
from tests.distributed.test_parity import (
    LOSS,
    SHARDING,
    WEIGHT,
    configured,
    data,  # noqa: F401  a fixture
    largest_difference,
    run_sharded,
    sharded,
)
from tests.distributed.test_resume import configured as resumable
from tests.distributed.test_resume import losses, resumed_from_half, run, without_dropout
from tests.support.ranks import run_ranks


def in_groups(data: Path, sharding: str, optimizer: str, groups: int = 2, interval: int = 1):  # noqa: F811
    config = configured(data, sharding, optimizer)
    planner = config.planner.model_copy(update={"groups": groups, "sync_interval": interval})
    return config.model_copy(update={"planner": planner})


@pytest.mark.parametrize("sharding", SHARDING)
def test_groups_of_sgd_train_as_one_group(data, sharding):  # noqa: F811
    one = run_sharded(2, configured(data, sharding, "sgd"))
    two = run_sharded(4, in_groups(data, sharding, "sgd"))
    loss, table, dense = largest_difference(one, two)
    assert loss < LOSS and table < WEIGHT and dense < WEIGHT, (loss, table, dense)


def copies(world: World, config) -> tuple[list, list]:
    losses, shards, _ = sharded(world, config)
    return losses, shards


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rowwise_adagrad"])
def test_copies_are_equal_after_a_mean_and_differ_before(data, optimizer):  # noqa: F811
    """Six steps: a mean after every third leaves equal copies, one after every fourth does not."""
    for interval, equal in ((3, True), (4, False)):
        ranks = run_ranks(copies, 4, in_groups(data, "row_wise", optimizer, interval=interval))
        assert all(losses == ranks[0][0] for losses, _ in ranks)
        for first, second in ((0, 2), (1, 3)):
            ours, theirs = ranks[first][1], ranks[second][1]
            assert [shard[:2] for shard in ours] == [shard[:2] for shard in theirs]
            same = all(np.array_equal(a[2], b[2]) for a, b in zip(ours, theirs, strict=True))
            assert same == equal


def grouped(config, interval: int = 1):
    planner = config.planner.model_copy(update={"groups": 2, "sync_interval": interval})
    return config.model_copy(update={"planner": planner})


def stored_bytes(run_dir: Path) -> int:
    """Bytes of tensors in the newest checkpoint."""
    folder = CheckpointFolder(run_dir / "checkpoints")
    return sum(file.stat().st_size for file in folder.final(folder.steps()[-1]).glob("*.distcp"))


def tried(world: World, config, checkpoint: Path) -> float:
    return evaluate(config, checkpoint, world, "test")["model"]["hr@10"]


@pytest.mark.slow
def test_a_checkpoint_has_one_copy_and_loads_anywhere(data, tmp_path):  # noqa: F811
    """Four ranks in two groups, of SGD, save half-way; one group of two ranks goes on as two groups do."""
    two, one, alone = tmp_path / "two", tmp_path / "one", tmp_path / "alone"
    whole = run_ranks(run, 4, grouped(without_dropout(resumable(data, two, optimizer="sgd"))))[0]
    run_ranks(run, 2, without_dropout(resumable(data, alone, optimizer="sgd")))
    assert stored_bytes(two) < 1.3 * stored_bytes(alone), "a copy more would double the tables"
    resumed_from_half(two, one)
    again = run_ranks(run, 2, without_dropout(resumable(data, one, optimizer="sgd")))[0]
    expected = {step: loss for step, loss in losses(two).items() if step in losses(one)}
    assert losses(one) == pytest.approx(expected, abs=LOSS) and len(expected) == 6
    assert again["model"] == whole["model"]


@pytest.mark.slow
def test_groups_agree_before_they_save_and_resume_bitwise(data, tmp_path):  # noqa: F811
    """The steps between two means are more than the run has: what is saved and evaluated is a mean all the same."""
    full, part = tmp_path / "full", tmp_path / "part"
    configs = [grouped(resumable(data, folder), interval=1000) for folder in (full, part)]
    whole = run_ranks(run, 4, configs[0])[0]
    resumed_from_half(full, part)
    again = run_ranks(run, 4, configs[1])[0]
    assert losses(part) == {step: loss for step, loss in losses(full).items() if step > 6}
    assert again["model"] == whole["model"]
    checkpoint = CheckpointFolder(full / "checkpoints").final(12)
    assert run_ranks(tried, 1, configs[0], checkpoint)[0] == whole["model"]["hr@10"]


def held(world: World, config) -> tuple[list[float], list[float]]:
    """Bytes of (tables, states) that this rank has, and that the planner says it has."""
    built = build(open_recipe(config), world)
    tables = TableOptimizer(built.model, config.embeddings, config.seed)
    states = [state.nbytes for own in tables.states for state in own.values()]
    own = [float(sum(shard.weight.nbytes for shard in tables.shards)), float(sum(states))]
    memory_MR = estimate(built.plan).memory_MR
    place = world.rank % memory_MR.shape[1]
    return own, [float(memory_MR[MEMORY.index(kind), place]) for kind in ("tables", "table_optimizer")]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adamw"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_rank_holds_the_bytes_that_are_planned(data, optimizer, dtype):  # noqa: F811
    config = in_groups(data, "row_wise", optimizer)
    embeddings = config.embeddings.model_copy(update={"dtype": dtype})
    for own, planned in run_ranks(held, 4, config.model_copy(update={"embeddings": embeddings})):
        assert own == planned


def mean_of(world: World, values: list[float], dtype: torch.dtype, draws: StochasticRounding | None) -> np.ndarray:
    assert dist.group.WORLD is not None
    tensor = torch.full((512, 16), values[world.rank], dtype=dtype)
    TableCopies(None, dist.group.WORLD, 1)._average(tensor, draws)
    return tensor.double().numpy()


class TestMeans:
    def test_equal_copies_stay_as_they_are(self):
        """A third of three times a number is another number in float32."""
        for mean in run_ranks(mean_of, 3, [0.1] * 3, torch.float32, None):
            assert (mean == np.float32(0.1)).all()

    def test_half_copies_have_an_exact_mean(self):
        """One of two moved by the least there is in fp16: half of the elements move, by draws that all ranks share."""
        values, least = [1.0, 1.0 + 2**-10], 2**-10
        nearest = run_ranks(mean_of, 2, values, torch.float16, None)
        assert len(np.unique(nearest[0])) == 1, "rounded to nearest, all elements are the same"
        first, second = run_ranks(mean_of, 2, values, torch.float16, StochasticRounding(7, 3, 0, 0, 16))
        assert (first == second).all()
        assert abs((first.mean() - 1) / least - 0.5) < 3 * 0.5 / np.sqrt(first.size)

"""Every strategy of the dense part trains the model that one process trains, beside sharded tables.

Row-wise and table-wise tables, clipped gradients, batches in which a rank has no token. fp32: equal up to the order of
sums.
"""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gr
from gr.checkpoint import CheckpointFolder
from gr.config.run import RunConfig
from gr.dist import World
from gr.experiment import build, train
from gr.experiment import trained as trained_model
from gr.models.dense import dense_parameters, local_part
from gr.parallel.dense import unwrapped
from gr.planner.dense_collectives import dense_collectives
from gr.planner.memory import fixed_memory
from gr.recipes.base import open_recipe
from gr.training.module import TrainModule
from gr.training.trainer import Trainer
from tests.support.plans import machine
from tests.support.ranks import RankError, run_ranks
from tests.support.run_folder import losses
from tests.support.tiny import tiny_config, write_groups
from tests.support.tiny_histories import tiny_ranking_config, write_histories
from tests.support.tiny_tabular import tiny_click_config, write_tiny_tabular

STEPS = 5
LOSS = 2e-6  # absolute, of losses of 1 to 4 nats
ULPS = 3e-7  # relative, of larger ones: sasrec's are 10 nats, where float32 has steps of 1e-6
COMMON: dict = {
    "embeddings": {"optimizer": {"kind": "rowwise_adagrad", "lr": 0.05}},
    "optimizer": {"kind": "adamw", "lr": 3e-3, "clip_grad_norm": 1.0, "weight_decay": 0.1},
    "planner": {"sharding": "table_wise", "tables": {"item_id": "row_wise"}},
    "trainer": {"global_batch_size": 4},
}
LLAMA = {"kind": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24}
SASREC = {"kind": "sasrec", "layers": 2, "heads": 2, "ffn_dim": 12, "dropout": 0.0}


@dataclass
class Outcome:
    """initial: values of the dense parameters, whole. norms: of the gradient. bytes: that this rank has of the dense
    weights, gradients and optimizer states. tokens: of this rank's batches. collectives: of the dense part in a step.
    """

    losses: list[float]
    norms: list[float]
    initial: dict[str, torch.Tensor]
    bytes: tuple[int, int, int]
    tokens: list[int]
    sharded: list[str]
    collectives: int


class DenseCollectives(TorchDispatchMode):
    """Counts the collectives of a step that carry weights, gradients or tokens of the dense part.

    Tables talk by all-to-all; what a tensor group tells itself of its lengths has one dim.
    """

    KINDS = "_allgather_base_", "_reduce_scatter_base_", "allreduce_", "allgather_", "all_reduce"

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional") and op.overloadpacket.__name__ in self.KINDS:
            (*_, sent) = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.count += op.overloadpacket.__name__ != "allgather_" or sent.dim() > 1
        return op(*args, **(kwargs or {}))


@cache
def data(folder: Path, kind: str) -> Path:
    path = folder / kind
    {"hstu": write_groups, "stu": write_histories, "click": write_tiny_tabular}[kind](path)
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Callable[..., RunConfig]:
    folder = tmp_path_factory.mktemp("data")

    def configured(kind: str, **sections) -> RunConfig:
        sections = {**COMMON, **sections}
        match kind:
            case "hstu" | "sasrec" | "llama":
                sections["data"] = {"train_holdout": 8}  # so that some users have nothing to train on
                if kind == "sasrec":
                    sections["model"] = {"tower": SASREC}
                elif kind == "llama":
                    sections["model"] = {"tower": LLAMA}
                return tiny_config(data(folder, "hstu"), folder / "run", **sections)
            case "stu":
                return tiny_ranking_config(data(folder, "stu"), folder / "run", **sections)
        planner = {"sharding": "table_wise", "tables": {"c2": "row_wise"}}
        return tiny_click_config(data(folder, "click"), folder / "run", **{**sections, "planner": planner})

    return configured


def trained(world: World, config: RunConfig) -> Outcome:
    recipe = open_recipe(config)
    built = build(recipe, world)
    module = TrainModule(built.model, recipe.objective(world), config, world)
    initial = {name: _whole(parameter) for name, parameter in module.dense.items()}
    gradients = []
    module.dense_optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(_bytes(p.grad) for p in module.dense.values()))
    )
    means, norms, tokens, loader = [], [], [], recipe.loader(world)
    for step in range(STEPS):
        batch = next(loader)
        tokens.append(module.objective.losses(batch))
        prepared, counted = module.prepare(batch, step), DenseCollectives()
        with counted:
            loss = module.forward(prepared)
            module.backward(loss, step)
        means.append(world.all_reduce_sum([float(loss.total)])[0] / loss.tokens)
        norms.append(float(module.gradient_norm))
    loader.close()
    states = [state for each in module.dense_optimizer.state.values() for state in each.values() if state.dim()]
    sizes = sum(map(_bytes, module.dense.values())), gradients[-1], sum(map(_bytes, states))
    sharded = [name for name, parameter in module.dense.items() if isinstance(parameter, DTensor)]
    return Outcome(
        means, norms, {name: x.numpy() for name, x in initial.items()}, sizes, tokens, sharded, counted.count
    )


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()).clone()


def _bytes(tensor: torch.Tensor) -> int:
    return local_part(tensor).nbytes


def planned_bytes(config: RunConfig, ranks: int) -> list[float]:
    """The planner's bytes of a rank's dense weights, gradients and optimizer states, without gathered layers."""
    inventory = config.inventory(config.load_schema())
    fixed = fixed_memory(inventory, machine(ranks))
    kinds = fixed["dense_gradients"], fixed["dense_gradients"], fixed["dense_optimizer"]
    assert fixed["dense_parameters"] >= fixed["dense_gradients"]
    return list(kinds)


def planned_collectives(config: RunConfig, ranks: int) -> int:
    inventory = config.inventory(config.load_schema())
    return sum(collectives.count for collectives in dense_collectives(inventory, machine(ranks)))


@pytest.fixture(scope="module")
def alone(config) -> Callable[[str], Outcome]:
    return cache(lambda kind: run_ranks(trained, 1, config(kind))[0])


FSDP, FSDP_TENSOR = {"strategy": "fsdp"}, {"strategy": "fsdp", "tensor_parallel": 2}
DDP, TENSOR = {"strategy": "ddp"}, {"tensor_parallel": 2}


@pytest.mark.parametrize(
    ("kind", "dense", "size"),
    [
        *(("hstu", *over) for over in [(DDP, 4), (FSDP, 2), (FSDP, 4)]),
        *(("llama", *over) for over in [(TENSOR, 2), (FSDP_TENSOR, 4)]),
        ("stu", FSDP, 4),
        ("sasrec", FSDP, 2),
        ("click", FSDP, 2),
    ],
    ids=str,
)
def test_a_strategy_trains_what_one_process_trains(config, alone, kind: str, dense: dict, size: int) -> None:
    ranks, expected = run_ranks(trained, size, config(kind, dense=dense)), alone(kind)
    for outcome in ranks:
        assert outcome.losses == pytest.approx(expected.losses, rel=ULPS, abs=LOSS)
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
        assert outcome.initial.keys() == expected.initial.keys()
        for name, value in outcome.initial.items():
            assert (value == expected.initial[name]).all(), f"initial {name}"
    if kind != "click":  # so small that a share cannot be even
        planned = planned_bytes(config(kind, dense=dense), size)
        assert [outcome.bytes for outcome in ranks] == [pytest.approx(planned, rel=0.02)] * size
        assert {outcome.collectives for outcome in ranks} == {planned_collectives(config(kind, dense=dense), size)}
    if size == 4 and kind != "click":
        assert min(min(outcome.tokens) for outcome in ranks) == 0, "a rank has a batch without a token"
    named = {"stu": ("tower", "head"), "click": ("bottom", "top")}.get(kind, ("tower",))
    in_fsdp = [name for name in expected.initial if name.startswith(named)] if "strategy" in dense else []
    if dense in (DDP, FSDP):
        assert ranks[0].sharded == (in_fsdp if dense == FSDP else [])


def run(world: World, config: RunConfig) -> dict | None:
    return train(config, world)


def killed(world: World, config: RunConfig, step: int) -> None:
    if world.rank == 1:
        Trainer._is_orphan = lambda self: self.step == step and os.kill(os.getpid(), signal.SIGKILL)
    train(config, world)


def saving(config: Callable[..., RunConfig], kind: str, run_dir: Path, dense: dict) -> RunConfig:
    """HALF steps, a checkpoint, and HALF steps more."""
    return config(
        kind,
        dense=dense,
        trainer={"global_batch_size": 4, "steps": 2 * STEPS, "writers": []},
        checkpoint={"every": STEPS, "keep_last": 9},
    ).model_copy(update={"run_dir": str(run_dir)})


def half_done(full: Path, run_dir: Path) -> Path:
    """The folder of a run as it was after the first half of `full`."""
    name = CheckpointFolder(full / "checkpoints").final(STEPS).name
    shutil.copytree(full / "checkpoints" / name, run_dir / "checkpoints" / name)
    return run_dir


@pytest.fixture(scope="module")
def saved_on_four(config, tmp_path_factory) -> dict[str, Path]:
    """Runs of four ranks: STU under FSDP, Llama under FSDP and tensor parallelism."""
    folders = {kind: tmp_path_factory.mktemp("runs") / kind for kind in ("stu", "llama")}
    for kind, folder in folders.items():
        run_ranks(run, 4, saving(config, kind, folder, FSDP_TENSOR if kind == "llama" else FSDP))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dense", "size"),
    [("stu", DDP, 2), ("llama", DDP, 1), ("llama", TENSOR, 2), ("llama", FSDP, 2), ("llama", FSDP_TENSOR, 4)],
    ids=str,
)
def test_what_four_ranks_saved_goes_on_in_any_layout(config, tmp_path, saved_on_four, kind, dense, size) -> None:
    part = half_done(saved_on_four[kind], tmp_path / "part")
    run_ranks(run, size, saving(config, kind, part, dense))
    before, after = dict(losses(saved_on_four[kind])), dict(losses(part))
    assert sorted(after) == list(range(STEPS + 1, 2 * STEPS + 1))
    assert after == pytest.approx({step: before[step] for step in after}, abs=LOSS)
    if dense == FSDP_TENSOR:  # as it was saved
        assert after == {step: before[step] for step in after}


@pytest.mark.slow
def test_a_checkpoint_does_not_know_the_strategy(config, tmp_path, saved_on_four) -> None:
    """gr.load reads the weights from it that two ranks have under FSDP."""
    checkpoint = CheckpointFolder(saved_on_four["llama"] / "checkpoints").final(2 * STEPS)
    in_ranks = run_ranks(loaded, 2, saving(config, "llama", tmp_path, FSDP), checkpoint)[0]
    for name, parameter in dense_parameters(gr.load(checkpoint).model).items():
        assert (in_ranks[name] == parameter.detach().numpy()).all(), name


def loaded(world: World, config: RunConfig, checkpoint: Path) -> dict:
    """The dense weights of a checkpoint in a model of two ranks, under FSDP."""
    with trained_model(config, checkpoint, world) as built:
        return {name: _whole(p).numpy() for name, p in dense_parameters(unwrapped(built.model)).items()}


@pytest.mark.slow
def test_killed_under_fsdp_it_resumes_bitwise(config, tmp_path) -> None:
    full, part = tmp_path / "full", tmp_path / "part"
    whole = run_ranks(run, 2, saving(config, "hstu", full, FSDP))[0]
    with pytest.raises(RankError):
        run_ranks(killed, 2, saving(config, "hstu", part, FSDP), STEPS + 2)
    assert CheckpointFolder(part / "checkpoints").steps() == [STEPS]
    again = run_ranks(run, 2, saving(config, "hstu", part, FSDP))[0]
    assert losses(part) == losses(full) and again["model"] == whole["model"]

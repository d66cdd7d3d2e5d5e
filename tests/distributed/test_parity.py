"""Sharded training on 1, 2 and 4 gloo ranks equals an unsharded single-process model, in loss, tables and dense.

fp32, so equal up to summation order: LOSS and WEIGHT below. Column-wise sharding with a row-wise optimizer is another
optimizer by design: each column shard keeps its own row statistics. It is compared with that definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torchrec import KeyedJaggedTensor

from gr.config.retrieval import RetrievalConfig
from gr.data.dataset import Dataset
from gr.data.history_batches import HistoryEpochs
from gr.data.loader import ResumableLoader
from gr.dist import World
from gr.dist import world as make_world
from gr.embeddings.init import key_of, truncated_normal
from gr.experiment import build
from gr.models.dense import initialise_dense
from gr.models.retrieval import RetrievalModel
from gr.parallel.load_balance import LoadBalancer
from gr.recipes.base import open_recipe
from gr.recipes.retrieval import RetrievalObjective
from gr.tasks import CandidateSampler
from gr.training.module import TrainModule
from gr.training.pipeline import Pipeline
from tests.support.ranks import run_ranks
from tests.support.schemas import item_schema
from tests.support.tiny import ITEMS, tiny_config, write_tiny

STEPS = 6
LOSS, WEIGHT = 2e-5, 2e-5  # absolute; losses are 3 to 17 nats, weights about 0.1
SHARDING = ("table_wise", "row_wise", "column_wise", "data_parallel")
# partial_rowwise_adam is rowwise_adamw without decay.
OPTIMIZERS = {"sgd": 0.02, "adagrad": 0.05, "rowwise_adagrad": 0.05, "adam": 0.01, "rowwise_adamw": 0.01}
DECAY = 0.5


@dataclass
class Outcome:
    losses: list[float]
    table: torch.Tensor
    dense: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny")


def optimizer_settings(kind: str) -> dict:
    return {"kind": kind, "lr": OPTIMIZERS[kind]} | ({"weight_decay": DECAY} if kind == "rowwise_adamw" else {})


def configured(data: Path, sharding: str, optimizer: str, negatives: str = "per_position") -> RetrievalConfig:
    return tiny_config(
        data,
        data / "unused",
        planner={"sharding": sharding, "allow_state_per_shard": True},
        embeddings={"optimizer": optimizer_settings(optimizer)},
        task={"negatives": {"kind": negatives}},
    )


def loader_for(config: RetrievalConfig, world: World) -> ResumableLoader:
    epochs = HistoryEpochs(
        Dataset.open(config.data.path),
        config.data,
        seed=config.seed,
        global_batch_size=config.trainer.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    return ResumableLoader(epochs)


def sampler_for(config: RetrievalConfig) -> CandidateSampler:
    return CandidateSampler(config.task, *Dataset.open(config.data.path).corpus(), config.seed)


def sharded(
    world: World, config: RetrievalConfig, ahead: int = 0, balanced: bool = False
) -> tuple[list[float], list, dict]:
    built = build(open_recipe(config), world)
    balance = LoadBalancer(lambda lengths_N: lengths_N**2.0, world) if balanced else None
    module = TrainModule(built.model, RetrievalObjective(sampler_for(config), world), config, world, balance)
    loader, losses = loader_for(config, world), []
    feed = Pipeline(loader, module, world, steps=STEPS, ahead=ahead)
    for step in range(STEPS):
        loss = module.forward(feed.take(step))
        feed.send_next()
        losses.append(world.all_reduce_sum([float(loss.total)])[0] / loss.tokens)
        module.backward(loss, step)
        feed.fill(step)
    loader.close()
    shards = [(s.row_offset, s.column_offset, s.weight.cpu().numpy().copy()) for s in module.table_optimizer.shards]
    return losses, shards, {name: p.detach().cpu().numpy().copy() for name, p in module.dense.items()}


def each_sharded(world: World, configs: list[RetrievalConfig]) -> list[tuple[list[float], list, dict]]:
    return [sharded(world, config) for config in configs]


def run_sharded(size: int, config: RetrievalConfig, ahead: int = 0, balanced: bool = False) -> Outcome:
    return joined(run_ranks(sharded, size, config, ahead, balanced))


def joined(ranks: Sequence[tuple[list[float], list, dict]]) -> Outcome:
    """What `sharded` returned on each rank, as of one."""
    table = torch.full((61, 8), torch.nan)
    for _, shards, _ in ranks:
        for row, column, weight in shards:
            table[row : row + weight.shape[0], column : column + weight.shape[1]] = torch.from_numpy(weight)
    for _, _, dense in ranks[1:]:
        assert all((dense[name] == ranks[0][2][name]).all() for name in dense), "dense replicas differ"
    return Outcome(ranks[0][0], table, {k: torch.from_numpy(v) for k, v in ranks[0][2].items()})


class LookedUpRows(torch.optim.Optimizer):
    """The definition of the optimizers of tables that keep moments: rows that were not looked up stay as they are.

    The second moment is a mean over a row, over its column shard, or, for kind adam, over nothing.
    """

    def __init__(self, weight: torch.nn.Parameter, kind: str, column_shards: int) -> None:
        super().__init__([weight], {"lr": OPTIMIZERS[kind]})
        self.weight, self.lr, self.kind, self.steps = weight, OPTIMIZERS[kind], kind, 0
        self.blocks = weight.shape[1] if kind == "adam" else column_shards
        self.mean = torch.zeros_like(weight)
        self.square = torch.zeros(len(weight), self.blocks, 1)
        self.looked_up = torch.zeros(len(weight), dtype=torch.bool)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        rows, self.looked_up = self.looked_up, torch.zeros_like(self.looked_up)
        gradient = self.weight.grad[rows]
        square = gradient.view(len(gradient), self.blocks, -1).square().mean(2, keepdim=True)
        decay = 0.0
        if self.kind == "rowwise_adagrad":
            self.square[rows] += square
            numerator, denominator = gradient, self.square[rows].sqrt() + 1e-8
        else:
            self.mean[rows] = 0.9 * self.mean[rows] + 0.1 * gradient
            self.square[rows] = 0.98 * self.square[rows] + 0.02 * square
            numerator = self.mean[rows] / (1 - 0.9**self.steps)
            denominator = (self.square[rows] / (1 - 0.98**self.steps)).sqrt() + 1e-8
            decay = DECAY if self.kind == "rowwise_adamw" else 0.0
        change = (numerator.view(len(gradient), self.blocks, -1) / denominator).view_as(gradient)
        self.weight[rows] -= self.lr * (change + decay * self.weight[rows])


def unsharded_optimizer(kind: str, weight: torch.nn.Parameter, column_shards: int) -> torch.optim.Optimizer:
    match kind:
        case "sgd":
            return torch.optim.SGD([weight], lr=OPTIMIZERS[kind])
        case "adagrad":
            return torch.optim.Adagrad([weight], lr=OPTIMIZERS[kind], eps=1e-8)
        case _:
            return LookedUpRows(weight, kind, column_shards)


def run_unsharded(config: RetrievalConfig, column_shards: int) -> Outcome:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    model = RetrievalModel(config, item_schema(ITEMS))
    model.tables.to_empty(device="cpu")
    weight = model.tables.embeddings["item_id"].weight
    with torch.no_grad():
        counters = torch.arange(61 * 8).view(61, 8)
        weight.copy_(truncated_normal(counters, key_of(config.seed, "item_id"), config.embeddings.init_std))
    initialise_dense(model, config.seed)
    dense = {name: p for name, p in model.named_parameters() if not name.startswith("tables")}
    of_table = unsharded_optimizer(config.embeddings.optimizer.kind, weight, column_shards)
    if isinstance(of_table, LookedUpRows):

        def watch(ids: KeyedJaggedTensor) -> None:
            of_table.looked_up[ids.values()] = True

        model.tables.register_forward_hook(lambda _, ids, __: watch(ids[0]))
    optimizers = [
        torch.optim.AdamW(dense.values(), lr=config.optimizer.lr, betas=(0.9, 0.98), weight_decay=0.0),
        of_table,
    ]
    sampler, loader, losses = sampler_for(config), loader_for(config, world), []
    for step in range(STEPS):
        batch = next(loader)
        loss = model(batch, sampler.draw(batch, step, world, 0)) / len(batch.target_ids_T)
        losses.append(float(loss.detach()))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    loader.close()
    return Outcome(losses, weight.detach(), {name: p.detach() for name, p in dense.items()})


def largest_difference(a: Outcome, b: Outcome) -> tuple[float, float, float]:
    assert a.dense.keys() == b.dense.keys()
    return (
        max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)),
        float((a.table - b.table).abs().max()),
        max(float((a.dense[name] - b.dense[name]).abs().max()) for name in a.dense),
    )


@pytest.fixture(scope="module")
def unsharded(data):
    @cache
    def run(optimizer: str, negatives: str = "per_position", column_shards: int = 1) -> Outcome:
        return run_unsharded(configured(data, "auto", optimizer, negatives), column_shards)

    return run


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sharding", SHARDING)
def test_sharded_equals_unsharded(data, unsharded, sharding, size):
    ranks = run_ranks(each_sharded, size, [configured(data, sharding, optimizer) for optimizer in OPTIMIZERS])
    for optimizer, outcomes in zip(OPTIMIZERS, zip(*ranks, strict=True), strict=True):
        # 8 columns make two blocks of four, the least that fbgemm takes.
        reference = unsharded(optimizer, column_shards=2 if sharding == "column_wise" else 1)
        loss, table, dense = largest_difference(joined(outcomes), reference)
        assert reference.losses[-1] < reference.losses[0], optimizer
        assert loss < LOSS and table < WEIGHT and dense < WEIGHT, (optimizer, loss, table, dense)


def test_column_shards_change_a_rowwise_optimizer(unsharded):
    """The guide tells users so."""
    whole, cut = (unsharded("rowwise_adagrad", column_shards=n) for n in (1, 2))
    assert largest_difference(whole, cut)[1] > 1e-3


@pytest.mark.parametrize("negatives", ["shared", "in_batch", "full"])
def test_every_kind_of_negatives_is_world_size_invariant(data, unsharded, negatives):
    config = configured(data, "row_wise", "adam", negatives)
    loss, table, dense = largest_difference(run_sharded(4, config), unsharded("adam", negatives))
    assert loss < LOSS and table < WEIGHT and dense < WEIGHT, (loss, table, dense)


def test_one_rank_equals_unsharded_and_the_planner_may_choose(data, unsharded):
    for size in (1, 2):
        outcome = run_sharded(size, configured(data, "auto", "rowwise_adagrad"))
        assert max(largest_difference(outcome, unsharded("rowwise_adagrad"))) < WEIGHT


@pytest.mark.parametrize("sharding", SHARDING)
def test_ids_sent_ahead_change_no_bit(data, sharding):
    """As on a GPU: the ids of a step are on their way while the one before is computed and updates the tables."""
    config = configured(data, sharding, "rowwise_adagrad")
    plain, ahead = (run_sharded(2, config, depth) for depth in (0, 2))
    assert plain.losses == ahead.losses and torch.equal(plain.table, ahead.table)
    assert all(torch.equal(plain.dense[name], ahead.dense[name]) for name in plain.dense)


@pytest.mark.gpu
def test_ids_sent_ahead_on_a_gpu(data):
    config = configured(data, "table_wise", "rowwise_adagrad").model_copy(update={"device": "cuda"})
    with make_world("cuda") as here:
        plain, ahead = (sharded(here, config, depth)[0] for depth in (0, 2))
    assert ahead == pytest.approx(plain, abs=LOSS)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("negatives", "sharding"),
    [*((kind, "row_wise") for kind in ("shared", "in_batch", "full")), *(("per_position", kind) for kind in SHARDING)],
)
def test_examples_may_change_ranks(data, unsharded, negatives, sharding, size):
    """Balanced, and ahead: the draws of a token go with it, and ranks differ in their number of examples."""
    config = configured(data, sharding, "adam", negatives)
    loss, table, dense = largest_difference(run_sharded(size, config, 2, True), unsharded("adam", negatives))
    assert loss < LOSS and table < WEIGHT and dense < WEIGHT, (loss, table, dense)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adamw"])
def test_fp16_tables_train_alike_at_any_world_size(data, optimizer):
    """The draws are the same bits; gradients that differ in their last bit between world sizes turn a few of them."""
    config = configured(data, "row_wise", optimizer)
    embeddings = config.embeddings.model_copy(update={"dtype": "fp16"})
    one, *more = [run_sharded(size, config.model_copy(update={"embeddings": embeddings})) for size in (1, 2, 4)]
    for outcome in more:
        assert (outcome.table == one.table).float().mean() > 0.5
        assert float((outcome.table - one.table).abs().max()) < 2**-11
        assert outcome.losses == pytest.approx(one.losses, abs=1e-3)

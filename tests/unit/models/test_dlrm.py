"""DLRM against the published equations, against TorchRec's models, and what must hold of it beside.

B examples, D width. The reference is tests/support/dlrm_reference.py.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from gr.config.click import BCELoss
from gr.config.dlrm import (
    CatInteraction,
    DCNInteraction,
    DLRMConfig,
    DotInteraction,
    Interaction,
    ProjectionInteraction,
)
from gr.config.inventory import TableConfig
from gr.config.optim import SGD
from gr.config.run import DenseConfig, EmbeddingsConfig
from gr.dist import World
from gr.embeddings import TableShard, local_shards
from gr.errors import ConfigError
from gr.models.convert.facebook_dlrm import from_facebook
from gr.models.dlrm import DLRM
from gr.parallel.dense import dense_parameters, parallelise_dense
from gr.parallel.mesh import build_mesh
from gr.parallel.tables import shard_tables
from gr.tasks.losses import click_loss
from tests.support.dlrm_reference import Bags, ReferenceDLRM, Shape, random_bags, tables_for

B, D, DENSE = 32, 8, 5
SHAPE = Shape((7, 50, 3), DENSE, D, (12, D), (16, 9, 1), "dot", branch1=(10, 2 * D), branch2=(3 * D,))
MANY = replace(SHAPE, rows=tuple(range(3, 29)), dense_features=13)
SHAPES = {pairs: replace(SHAPE, pairs=pairs) for pairs in ("dot", "dot_itself", "cat", "dcn", "projection")}
SHAPES |= {f"{pairs}, 26 tables": replace(MANY, pairs=pairs) for pairs in ("dot", "dcn")}
ALL = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
MLPERF = {"dim": 128, "bottom": (512, 256, 128), "top": (1024, 1024, 512, 256, 1)}


def tables_of(shape: Shape, config: DLRMConfig) -> list[TableConfig]:
    return tables_for(config, {f"table_{k}": rows for k, rows in enumerate(shape.rows)})


def interaction_of(shape: Shape) -> Interaction:
    kinds: dict[str, Interaction] = {
        "dot": DotInteraction(),
        "dot_itself": DotInteraction(self_interaction=True),
        "cat": CatInteraction(),
        "dcn": DCNInteraction(layers=shape.layers, rank=shape.rank),
        "projection": ProjectionInteraction(branch1=shape.branch1, branch2=shape.branch2),
    }
    return kinds[shape.pairs]


def config_of(shape: Shape) -> DLRMConfig:
    return DLRMConfig(dim=shape.dim, bottom=shape.bottom, top=shape.top, interaction=interaction_of(shape))


def build(shape: Shape) -> DLRM:
    config = config_of(shape)
    model = DLRM(config, tables_of(shape, config), shape.dense_features)
    model.tables.to_empty(device="cpu")
    return model


def named_as_gr(tensors: dict[str, Tensor], model: DLRM) -> dict[str, Tensor]:
    """The reference's weights, or their gradients, by the model's names and in its order of columns."""
    if model.config.interaction.kind in ("dot", "cat"):
        return from_facebook(tensors, model)
    renamed = {}
    for name, tensor in tensors.items():
        first, *rest = name.split(".")
        if first == "emb_l":
            renamed[f"tables.embedding_bags.{model.features[int(rest[0])]}.weight"] = tensor
        elif first.startswith("cross_"):
            renamed[f"interaction.layers.{rest[0]}.{first[6:].replace('b', 'bias')}"] = tensor
        else:
            prefix = {"bot_l": "bottom", "top_l": "top", "branch_1": "interaction.branch1"}
            renamed[".".join([prefix.get(first, "interaction.branch2"), *rest])] = tensor
    return renamed


def same_weights(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[ReferenceDLRM, DLRM]:
    torch.manual_seed(3)
    reference, model = ReferenceDLRM(shape), build(shape)
    if dtype == torch.float64:
        model.tables = DoubleBags(model)
    model.load_state_dict(named_as_gr(reference.state_dict(), model))
    return reference.to(dtype), model.to(dtype)


class DoubleBags(nn.Module):
    """Tables whose sums stay in float64: EmbeddingBagCollection rounds them to float32 whatever its weights are."""

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict(model.tables.embedding_bags)

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        bags = sparse.to_dict()
        pooled = {k: bag(bags[k].values(), bags[k].offsets()) for k, bag in self.embedding_bags.items()}
        return KeyedTensor.from_tensor_list(list(pooled), list(pooled.values()))


class NoExamples(nn.Module):
    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        keys = sparse.keys()
        return KeyedTensor.from_tensor_list(keys, [torch.zeros(0, D)] * len(keys))


def kjt(bags: Bags) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[f"table_{k}" for k in range(len(bags))],
        values=torch.tensor(list(chain(*chain(*bags))), dtype=torch.int64),
        lengths=torch.tensor([len(example) for examples in bags for example in examples]),
    )


def batch_of(shape: Shape, seed: int = 1, batch: int = B) -> tuple[Tensor, Bags, Tensor]:
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch, shape.dense_features, generator=random)
    return dense, random_bags(shape.rows, batch, 5, seed), torch.randint(0, 2, (batch,), generator=random).float()


def largest_gap(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize(
    ("dtype", "of_probability", "of_gradient"), [(torch.float32, 1e-6, 1e-7), (torch.float64, 1e-12, 1e-12)], ids=str
)
@ALL
def test_equals_the_published_equations(
    shape: Shape, dtype: torch.dtype, of_probability: float, of_gradient: float
) -> None:
    reference, model = same_weights(shape, dtype)
    dense, bags, labels = batch_of(shape)
    dense, labels = dense.to(dtype), labels.to(dtype)
    expected, logits = reference(dense, bags), model(dense, kjt(bags))
    assert logits.dtype == dtype and float(expected.std()) > 0.01
    assert largest_gap(logits.sigmoid(), expected) <= of_probability
    nn.functional.binary_cross_entropy(expected, labels).backward()
    click_loss(logits, labels, BCELoss()).mean().backward()
    wanted, got = named_as_gr(gradients(reference), model), gradients(model)
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert wanted[name].abs().max() > 0, name
        assert largest_gap(got[name], wanted[name]) <= of_gradient, name


@pytest.mark.parametrize("pairs", ["dot", "dcn", "projection"])
def test_equals_torchrec(pairs: str) -> None:
    """Whole models, weights copied as they are: here the triangle has the same order."""
    shape = SHAPES[pairs]
    torch.manual_seed(5)
    bags = [EmbeddingBagConfig(n, D, f"table_{k}", feature_names=[f"table_{k}"]) for k, n in enumerate(shape.rows)]
    parts = [EmbeddingBagCollection(bags), DENSE, list(shape.bottom), list(shape.top)]
    theirs: nn.Module
    if pairs == "dcn":
        theirs = torchrec_dlrm.DLRM_DCN(*parts, dcn_num_layers=shape.layers, dcn_low_rank_dim=shape.rank)
    elif pairs == "projection":
        theirs = torchrec_dlrm.DLRM_Projection(*parts, list(shape.branch1), list(shape.branch2))
    else:
        theirs = torchrec_dlrm.DLRM(*parts)
    for bias in getattr(getattr(theirs.inter_arch, "crossnet", None), "bias", ()):
        nn.init.normal_(bias)
    mine = build(shape)
    parameters = list(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters:
            mine.get_parameter(torchrec_name(name, len(shape.top))).copy_(parameter)
    assert len(parameters) == len(list(mine.parameters()))
    dense, bags_of_ids, labels = batch_of(shape)
    for model in (theirs, mine):
        logits = model(dense, kjt(bags_of_ids)).view(-1)
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
    expected = theirs(dense, kjt(bags_of_ids)).squeeze(1)
    assert largest_gap(mine(dense, kjt(bags_of_ids)).sigmoid(), expected.sigmoid()) <= 1e-6
    got = gradients(mine)
    for name, gradient in gradients(theirs).items():
        assert largest_gap(got[torchrec_name(name, len(shape.top))], gradient) <= 1e-7, name


def torchrec_name(name: str, top_layers: int) -> str:
    """gr's name of a parameter of torchrec.models.dlrm."""
    first, *middle, last = name.split(".")
    numbers = [int(part) for part in middle if part.isdigit()]
    if first == "sparse_arch":
        return f"tables.embedding_bags.{middle[-1]}.weight"
    if first == "dense_arch":
        return f"bottom.{2 * numbers[0]}.{last}"
    if first == "over_arch":
        layer = numbers[1] if numbers[0] == 0 else top_layers - 1
        return f"top.{2 * layer}.{last}"
    if "crossnet" in middle:
        kind = {"W_kernels": "w", "V_kernels": "v", "bias": "bias"}[middle[1]]
        return f"interaction.layers.{last}.{kind}"
    return f"interaction.{middle[0].removeprefix('interaction_')}.{2 * numbers[0]}.{last}"


@pytest.mark.parametrize("pairs", ["dot", "dcn"])
def test_a_hundred_steps_of_sgd_keep_beside_the_reference(pairs: str) -> None:
    reference, model = same_weights(SHAPES[pairs])
    steps = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (reference, model)]
    losses = []
    for step in range(100):
        dense, bags, labels = batch_of(SHAPES[pairs], seed=step)
        expected = nn.functional.binary_cross_entropy(reference(dense, bags), labels)
        loss = click_loss(model(dense, kjt(bags)), labels, BCELoss()).mean()
        for each, value in zip(steps, (expected, loss), strict=True):
            each.zero_grad()
            value.backward()
            each.step()
        losses.append((float(loss.detach()), float(expected.detach())))
    assert max(abs(mine - theirs) for mine, theirs in losses) < 1e-5
    assert abs(losses[0][0] - losses[-1][0]) > 1e-3


def sgd(weight: Tensor, gradient: Tensor, state: Tensor, lr: float) -> Tensor:
    return weight - lr * gradient


def adagrad(weight: Tensor, gradient: Tensor, state: Tensor, lr: float) -> Tensor:
    state += gradient**2
    return weight - lr * gradient / (state.sqrt() + 1e-8)


def rowwise_adagrad(weight: Tensor, gradient: Tensor, state: Tensor, lr: float) -> Tensor:
    """One accumulator a row, of the mean square (RWSAdagrad of facebookresearch/dlrm)."""
    state += (gradient**2).mean(dim=1, keepdim=True)
    return weight - lr * gradient / (state.sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("formula", "fused"),
    [(sgd, torch.optim.SGD), (adagrad, torch.optim.Adagrad), (rowwise_adagrad, RowWiseAdagrad)],
    ids=["sgd", "adagrad", "rowwise_adagrad"],
)
def test_fused_steps_on_pooled_tables_follow_the_formula(formula: Callable[..., Tensor], fused: type) -> None:
    """Five steps of fbgemm's fused optimizers, with rows that repeat within a bag and a batch."""
    shape, lr = SHAPES["dot"], 0.05
    reference, model = same_weights(shape)
    bags = tables_of(shape, config_of(shape))
    configs = [EmbeddingBagConfig(table.rows, D, table.name, feature_names=[table.name]) for table in bags]
    options = {"lr": lr} if formula is sgd else {"lr": lr, "eps": 1e-8}
    bags_of_model = FusedEmbeddingBagCollection(configs, fused, options, device=torch.device("cpu"))
    tables = {f"table_{k}": reference.get_parameter(f"emb_l.{k}.weight") for k in range(len(shape.rows))}
    weights = {name.split(".")[1]: weight for name, weight in bags_of_model.state_dict().items()}
    for name, weight in weights.items():
        weight.copy_(tables[name].detach())
    model.tables = bags_of_model
    states = {name: torch.zeros_like(weight) for name, weight in tables.items()}
    for step in range(5):
        dense, bags, labels = batch_of(shape, seed=step)
        reference.zero_grad()
        nn.functional.binary_cross_entropy(reference(dense, bags), labels).backward()
        click_loss(model(dense, kjt(bags)), labels, BCELoss()).mean().backward()
        for name, weight in tables.items():
            assert weight.grad is not None
            weight.data = formula(weight.data, weight.grad, states[name], lr)
            assert largest_gap(weights[name], weight) <= 1e-6, (name, step)


@pytest.mark.parametrize(
    ("interaction", "parameters"), [(DCNInteraction(layers=3, rank=512), 16_044_545), (DotInteraction(), 2_368_897)]
)
def test_size_of_the_published_models(interaction: Interaction, parameters: int) -> None:
    """MLPerf DLRM-v2 and v1: 26 tables, 13 dense features."""
    config = DLRMConfig(**MLPERF, interaction=interaction)
    tables = tables_for(config, {f"c{i}": 40_000_000 for i in range(26)})
    with torch.device("meta"):
        model = DLRM(config, tables, 13)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    in_tables = sum(parameter.numel() for parameter in model.tables.parameters())
    assert in_tables == 26 * 40_000_000 * 128
    assert sum(parameter.numel() for parameter in model.parameters()) - in_tables == parameters


def test_the_order_of_pooled_columns_does_not_matter() -> None:
    """Under a sharding plan it is the plan's."""
    _, model = same_weights(SHAPES["dot"])
    dense, bags, _ = batch_of(SHAPE)
    expected = model(dense, kjt(bags))
    in_order = model.tables

    class Reversed(nn.Module):
        def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
            pooled = in_order(sparse).to_dict()
            names = list(reversed(pooled))
            return KeyedTensor(names, [D] * len(names), torch.cat([pooled[name] for name in names], dim=1))

    model.tables = Reversed()
    assert torch.equal(model(dense, kjt(bags)), expected)


def part(table: Tensor, shard: TableShard) -> Tensor:
    rows, columns = shard.weight.shape
    return table[shard.row_offset :, shard.column_offset :][:rows, :columns]


def test_sharded_it_makes_the_same_steps(alone: World) -> None:
    """Three ways to shard at once, one of them twice on this rank: three steps of SGD on tables and MLPs."""
    shape = SHAPES["dot"]
    reference, model = same_weights(shape)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    embeddings = EmbeddingsConfig(optimizer=SGD(lr=0.1))
    with torch.device("meta"):
        unsharded = DLRM(model.config, tables_of(shape, model.config), DENSE)
    ways = {
        "table_0": column_wise(ranks=[0, 0], compute_kernel="fused"),
        "table_1": row_wise(compute_kernel="fused"),
        "table_2": table_wise(rank=0, compute_kernel="fused"),
    }
    sharder = EmbeddingBagCollectionSharder()
    plan = ShardingPlan({"tables": construct_module_sharding_plan(unsharded.tables, ways, sharder, 1, 1, "cpu")})
    sharded = shard_tables(unsharded, plan, embeddings, alone.device)
    sharded = parallelise_dense(sharded, build_mesh(alone), DenseConfig(), alone.device)
    dense = dense_parameters(sharded)
    with torch.no_grad():
        for name, parameter in dense.items():
            parameter.copy_(weights[name])
        for shard in local_shards(sharded):
            shard.weight.copy_(part(weights[f"tables.embedding_bags.{shard.table}.weight"], shard))
    steps = [torch.optim.SGD(each, lr=0.1) for each in (reference.parameters(), dense.values())]
    for step in range(3):
        features, bags, labels = batch_of(shape, seed=step)
        expected, logits = reference(features, bags), sharded(features, kjt(bags))
        assert largest_gap(logits.sigmoid(), expected) <= 1e-6
        for each in steps:
            each.zero_grad()
        nn.functional.binary_cross_entropy(expected, labels).backward()
        click_loss(logits, labels, BCELoss()).mean().backward()
        for each in steps:
            each.step()
    trained = named_as_gr(dict(reference.named_parameters()), model)
    for shard in local_shards(sharded):
        name = f"tables.embedding_bags.{shard.table}.weight"
        assert largest_gap(shard.weight, part(trained[name], shard)) <= 1e-6
        assert largest_gap(shard.weight, part(weights[name], shard)) > 1e-4


def test_an_example_does_not_see_its_batch_mates() -> None:
    for shape in SHAPES.values():
        _, model = same_weights(shape, torch.float64)
        dense, bags, _ = batch_of(shape)
        together = model(dense.double(), kjt(bags))
        for b in (0, 7):
            alone = model(dense[b : b + 1].double(), kjt([examples[b : b + 1] for examples in bags]))
            assert largest_gap(alone, together[b : b + 1]) < 1e-12


@ALL
def test_no_examples_still_give_every_dense_parameter_a_gradient(shape: Shape) -> None:
    """DDP waits for all of them."""
    _, model = same_weights(shape)
    # TorchRec's KeyedJaggedTensor cannot be taken apart without examples.
    model.tables = NoExamples()
    logits = model(torch.zeros(0, shape.dense_features), kjt([[] for _ in shape.rows]))
    assert logits.shape == (0,)
    logits.sum().backward()
    for part in (model.bottom, model.interaction, model.top):
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in part.parameters())


@pytest.mark.parametrize(
    ("names", "dense_features", "message"),
    [
        ([], 13, "no categorical features; it needs at least one"),
        (["a"], 0, r"model.bottom=\[8\] has nothing to read, as there are no dense features: set it to null"),
        (["a", "b", "a"], 13, "table a is named more than once"),
    ],
)
def test_refuses(names: list[str], dense_features: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tables = [TableConfig(name=name, rows=9, dim=D) for name in names]
        DLRM(DLRMConfig(dim=D, bottom=(D,), top=(1,)), tables, dense_features)

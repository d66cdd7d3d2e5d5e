"""Strategies of the dense part: their bytes and collectives by hand, and the remedies that name them."""

from time import process_time

import pytest

from gr.api import planning_problem
from gr.config.inventory import GivenDense, InventoryConfig, TowerDense
from gr.config.towers import LlamaConfig
from gr.errors import ConfigError, PlanError
from gr.planner.dense_collectives import dense_collectives
from gr.planner.dense_strategies import changed_keys, compare_strategies, strategies, strategy_words
from gr.planner.estimate import PHASES, estimate
from gr.planner.memory import fixed_memory
from gr.planner.plan import DoesNotFit, search
from gr.planner.remedies import explanation
from gr.planner.smallest import smallest, smallest_by_strategy
from gr.planner.topology import parse_topology
from tests.support import ROOT
from tests.support.plans import machine

LLAMA_70B = str(ROOT / "configs/llm/70b-pretrain.yaml")
PARAMETERS = 68_976_648_192
D, LAYERS = 16, 2
TOWER = LlamaConfig(layers=LAYERS, heads=4, kv_heads=2, ffn_dim=24)
MATRICES = LAYERS * (2 * D * D + 2 * D * 8 + 3 * D * 24)
NORMS = (2 * LAYERS + 1) * D


def small(**fields: object) -> InventoryConfig:
    dense = TowerDense(tower=TOWER, dim=D, mean_length=8, max_length=8, other_parameters=100, replicated_parameters=60)
    return InventoryConfig.model_validate(
        {"rank_batch_size": 2, "tables": (), "dense": dense, "precision": "fp32"} | fields
    )


def sent(inventory: InventoryConfig, ranks: int) -> dict[str, tuple[int, float]]:
    """(collectives, bytes that a rank sends) of each phase."""
    phases: dict[str, tuple[int, float]] = {}
    for each in dense_collectives(inventory, machine(ranks)):
        count, bytes_ = phases.get(each.phase, (0, 0.0))
        phases[each.phase] = count + each.count, bytes_ + each.intra_bytes + each.inter_bytes
    return phases


def test_ddp_sums_all_gradients_in_one_bucket():
    assert sent(small(), 4) == {"gradient_all_reduce": (1, 2 * 4 * (MATRICES + NORMS + 100) * 3 / 4)}
    assert sent(small(), 1) == {}


def test_fsdp_gathers_twice_and_scatters_once():
    """Two layers, the last norm and one head; 60 position weights are replicated."""
    whole = 4 * (MATRICES + NORMS + 40)
    assert sent(small(dense_parallel="fsdp"), 4) == {
        "weight_all_gather": (4, pytest.approx(whole * 3 / 4)),
        "gradient_all_reduce": (9, pytest.approx((2 * whole + 2 * 4 * 60) * 3 / 4)),
    }


def test_layers_gathered_in_bf16_are_half_as_many_bytes():
    whole = sent(small(dense_parallel="fsdp"), 4)["weight_all_gather"][1]
    half = sent(small(dense_parallel="fsdp", dense_gathered="bf16"), 4)["weight_all_gather"][1]
    assert whole - half == pytest.approx(2 * (MATRICES + NORMS) * 3 / 4)


def test_tensor_ranks_join_tokens_and_sum_seven_times_a_layer():
    """2 ranks of 2 examples of 8 tokens: in fp32 D wide, joined once and their gradients once, then summed."""
    joined = 2 * 2 * 8 * D * 4
    phases = sent(small(dense_parallel="fsdp", tensor_parallel=2), 4)
    assert phases["tensor_all_reduce"] == (2 + 7 * LAYERS, pytest.approx((2 * joined + 2 * 14 * joined) / 2))
    # A rank's half of the matrices is shared with one other; the head is shared by all.
    part = 4 * (MATRICES / 2 + NORMS)
    assert phases["weight_all_gather"] == (4, pytest.approx(part / 2 + 4 * 40 * 3 / 4))


def test_a_tensor_group_of_all_ranks_sums_what_is_not_split():
    phases = sent(small(tensor_parallel=2), 2)
    assert phases["gradient_all_reduce"] == (1, 2 * 4 * (NORMS + 100) / 2)


def test_the_forward_pass_hides_its_gathers_and_nothing_hides_sums_of_tensor_ranks():
    estimated = estimate(search(small(dense_parallel="fsdp", tensor_parallel=2, rank_batch_size=2048), machine(4)))
    seconds = dict(zip(PHASES, estimated.seconds_PR.max(axis=1), strict=True))
    hidden = dict(zip(PHASES, estimated.hidden_P, strict=True))
    assert hidden["weight_all_gather"] == seconds["weight_all_gather"] > 0
    assert hidden["gradient_all_reduce"] == seconds["gradient_all_reduce"] > 0
    assert hidden["tensor_all_reduce"] == 0 < seconds["tensor_all_reduce"]


class TestLlama70B:
    """Of the paper: 1,024 examples of 4,096 tokens a step, AdamW in fp32."""

    def test_bytes_of_a_rank_by_strategy(self):
        inventory, topology, _ = planning_problem(LLAMA_70B, (), "h100x256")
        ddp, fsdp = ({"dense_parallel": each, "dense_gathered": "fp32"} for each in ("ddp", "fsdp"))
        replicated = fixed_memory(inventory.model_copy(update=ddp), topology)
        shared = fixed_memory(inventory.model_copy(update=fsdp), topology)
        split = fixed_memory(inventory.model_copy(update=fsdp | {"tensor_parallel": 8}), topology)
        norms = (2 * 80 + 1) * 8192
        for fixed, parameters in (
            (replicated, PARAMETERS),
            (shared, PARAMETERS / 256),
            # Norms are the same on the 8 ranks of a group.
            (split, PARAMETERS / 256 + norms * (1 / 32 - 1 / 256)),
        ):
            assert fixed["dense_gradients"] == pytest.approx(4 * parameters, rel=1e-9)
            assert fixed["dense_optimizer"] == pytest.approx(8 * parameters, rel=1e-9)

    def test_the_smallest_cluster_and_every_strategy_take_a_cpu_second(self):
        begin = process_time()
        inventory, topology, divides = planning_problem(LLAMA_70B, (), "h100x256")
        assert smallest(inventory, topology, divides).ranks == 256
        ranks = {strategy_words(each): least for each, least in smallest_by_strategy(inventory, topology, divides)}
        rows = compare_strategies(estimate(search(inventory, topology)))
        assert process_time() - begin <= 1.0
        again = {name: least for (name, layers), least in ranks.items() if layers == "again"}
        assert again == {"fsdp": 256, "ddp": None, "fsdp+tp 2": 512, "fsdp+tp 4": 1024, "fsdp+tp 8": None}
        assert [strategy_words(row.inventory)[0] for row in rows if row.estimate.fits] == ["fsdp"]
        assert rows[0].collectives == 3 * (80 + 1 + 1)

    def test_remedies_name_what_to_set(self):
        copied = ["dense.strategy=ddp", "dense.gathered=fp32", "dense.activation_checkpointing=none"]
        inventory, topology, divides = planning_problem(LLAMA_70B, copied, "h100x256")
        with pytest.raises(DoesNotFit, match=r"dense.strategy=fsdp shares it") as error:
            search(inventory, topology)
        lines = explanation(inventory, topology, error.value, divides).splitlines()
        keys = "dense.strategy=fsdp dense.gathered=bf16 dense.activation_checkpointing=layer"
        assert any(line.strip().startswith(f"{keys}: fits, 65.3 GB on the fullest rank") for line in lines)
        split = keys.replace("dense.gathered", "dense.tensor_parallel=2 dense.gathered")
        assert f"  {split}: fits on 512 ranks" in lines


def test_a_small_dense_part_has_no_strategies():
    topology = parse_topology("h100x8")
    assert strategies(small(), topology) == []
    large = small(dense=GivenDense(parameters=10**9))
    (itself, shared) = strategies(large, topology)
    assert itself == large and changed_keys(large, shared) == "dense.strategy=fsdp"


@pytest.mark.parametrize(
    ("fields", "ranks"),
    [
        ({"dense_parallel": "fsdp"}, 1),
        ({"dense_parallel": "fsdp", "tensor_parallel": 2}, 3),
        ({"tensor_parallel": 2}, 4),
    ],
)
def test_ranks_on_which_the_dense_part_cannot_lie_are_refused(fields, ranks):
    with pytest.raises(PlanError, match=f"cannot lie on {ranks} ranks"):
        search(small(**fields), machine(ranks))
    assert smallest(small(**fields), machine(4), divides=8).ranks == 2


def test_a_split_that_a_run_refuses_is_not_planned():
    given = small(dense_parallel="fsdp", tensor_parallel=2)
    heads = TowerDense(tower=LlamaConfig(layers=1, heads=3), dim=48, mean_length=8, max_length=16)
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 does not divide tower\.heads=3"):
        search(given.model_copy(update={"dense": heads}), machine(4))
    with pytest.raises(ConfigError, match=r"only tower\.kind=llama can be split"):
        search(given.model_copy(update={"dense": GivenDense(parameters=10)}), machine(4))

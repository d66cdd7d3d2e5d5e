"""Parameters, FLOPs and activations of dense parts against published and built models."""

import numpy as np
import pytest
import torch

from gr.config.dlrm import CatInteraction, DCNInteraction, DotInteraction, Interaction
from gr.config.inventory import DLRMDense, GivenDense, InventoryConfig, LossInventory, TableConfig, TowerDense
from gr.config.towers import HSTUConfig, SASRecConfig, STUConfig
from gr.planner.estimate_dense import DenseWork, dense_work, sequence_flops
from gr.sequence import JaggedSequence
from gr.towers.hstu import HSTU

SEQUENCE = (TableConfig(name="items", rows=10, dim=8, kind="sequence"),)
CRITEO = tuple(TableConfig(name=f"t{i}", rows=10, dim=128) for i in range(26))
# NVIDIA recsys-examples, E2E_BENCHMARK.md: 8 layers, 4 heads x 256, width 1024.
WIDE = HSTUConfig(layers=8, heads=4, qk_dim=256, v_dim=256, position_bias=False)
H100_RUN = TowerDense(tower=WIDE, dim=1024, mean_length=4099, max_length=4099)
STU = TowerDense(tower=STUConfig(layers=8, heads=4, qk_dim=256, v_dim=256), dim=1024, mean_length=4099, max_length=4099)
SASREC = TowerDense(tower=SASRecConfig(layers=3, heads=8, ffn_dim=2048), dim=512, mean_length=100.0, max_length=100)


def work(dense, batch: int = 1, **fields) -> DenseWork:
    tables = CRITEO if isinstance(dense, DLRMDense) else SEQUENCE
    return dense_work(InventoryConfig(rank_batch_size=batch, tables=tables, dense=dense, **fields), batch)


@pytest.mark.parametrize("dense", [H100_RUN, SASREC], ids=["hstu", "sasrec"])
def test_flops_by_length(dense: TowerDense) -> None:
    """Examples of the mean length cost what dense_work says; scores grow with the square of a length, the rest not."""
    inventory = InventoryConfig(
        rank_batch_size=3, tables=SEQUENCE, dense=dense, loss=LossInventory(scores_per_example=1e6)
    )
    whole = dense_work(inventory, 3)
    n = dense.mean_length
    assert sequence_flops(inventory, np.full(3, n)).sum() == pytest.approx(whole.forward_flops + whole.backward_flops)
    none, half, one = sequence_flops(inventory, np.array([0, n / 2, n]))
    assert none == 0 and one / 4 < half < one / 2


class TestHSTU:
    def test_flops_of_a_measured_run(self):
        # 187.0 ms a step at 34.54 % of an H100's 989 TFLOP/s, 32 examples of 4099 tokens (fixed shape).
        step = work(H100_RUN, 32)
        assert step.forward_flops + step.backward_flops == pytest.approx(0.1870 * 0.3454 * 989e12, rel=2e-3)
        assert step.tokens == 32 * 4099

    def test_flops_of_dlrm_v4(self):
        # mlcommons/training, recommendation/README.MD, computation cost analysis: 315.7 GFLOP a sample.
        stu = STUConfig(layers=3, heads=4, qk_dim=128, v_dim=128)
        step = work(TowerDense(tower=stu, dim=512, mean_length=4096, max_length=4096))
        assert step.forward_flops + step.backward_flops == pytest.approx(315.7e9, rel=1e-3)

    def test_the_papers_14_bytes(self):
        """arXiv 2402.17152, section 3.4, a token and layer: what STU keeps when it recomputes the gate."""
        step = work(STU)
        assert step.activation_bytes == 14 * 1024 * 8 * 4099
        assert work(STU, precision="fp32").activation_bytes == 2 * step.activation_bytes

    def test_heads_of_another_width_than_the_model(self):
        narrow = STU.model_copy(update={"tower": STUConfig(layers=8, heads=4, qk_dim=32, v_dim=64)})
        # 2d + 2d + 4 h d_qk + 4 h d_v + 2 h d_v
        assert work(narrow).activation_bytes == (4 * 1024 + 4 * 4 * 32 + 6 * 4 * 64) * 8 * 4099

    @pytest.mark.parametrize("concat_ua", [False, True])
    def test_without_recomputation_it_is_what_autograd_keeps(self, concat_ua):
        D, lengths = 64, [100, 37, 80]
        tower = HSTUConfig(
            layers=2, heads=2, qk_dim=16, v_dim=32, dropout=0.0, position_bias=False, concat_ua=concat_ua
        )
        dense = TowerDense(tower=tower, dim=D, mean_length=1, max_length=128)
        mask = 2 * 2 * 32 * 3 if concat_ua else 0  # dropout is off here: a byte an element that enters W_o
        measured = bytes_kept(HSTU(tower, dim=D, max_length=128), D, lengths)
        assert measured == pytest.approx(work(dense, precision="fp32").activation_bytes - mask, rel=0.02)


def bytes_kept(stack: torch.nn.Module, dim: int, lengths: list[int]) -> float:
    """Bytes a token of the storages that autograd saves in a forward pass, parameters apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sequence = JaggedSequence(torch.randn(sum(lengths), dim, requires_grad=True), offsets, 128, None, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stack(sequence)
    return sum(storage.nbytes() for storage in storages.values()) / sum(lengths)


class TestSASRec:
    def test_the_papers_33_bytes(self):
        """arXiv 2402.17152, section 3.4: 33 d a token and layer in bf16, for a feed-forward of 4 d."""
        assert work(SASREC).activation_bytes == 33 * 512 * 3 * 100


class TestDLRM:
    def dlrm(self, interaction: Interaction) -> DLRMDense:
        return DLRMDense(dim=128, bottom=(512, 256, 128), top=(1024, 1024, 512, 256, 1), interaction=interaction)

    def test_mlperf_dlrm_v2(self):
        # 16.04 M parameters; 32 MFLOP a sample forward, two to a multiply-add
        step = work(self.dlrm(DCNInteraction()))
        assert step.parameters == 16_044_545
        assert step.forward_flops == pytest.approx(32.06e6, rel=1e-3)
        assert step.backward_flops == 2 * step.forward_flops
        assert step.tokens == 0

    def test_mlperf_dlrm_v1(self):
        # Interaction width 128 + 27 x 26 / 2 = 479; 2.37 M parameters
        top = 479 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256 + 256 + 1
        bottom = 13 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128
        assert work(self.dlrm(DotInteraction())).parameters == bottom + top == 2_368_897

    def test_cat(self):
        wider = (27 * 128 - 479) * 1024
        assert work(self.dlrm(CatInteraction())).parameters == 2_368_897 + wider

    def test_features_of_one_table_are_vectors_of_their_own(self):
        table = TableConfig(name="shared", rows=10, dim=128, features=26)
        inventory = InventoryConfig(rank_batch_size=1, tables=(table,), dense=self.dlrm(DotInteraction()))
        assert dense_work(inventory, 1).parameters == 2_368_897


class TestTheRest:
    def test_given(self):
        given = GivenDense(parameters=7, forward_flops_per_example=3.0, activation_bytes_per_example=5.0)
        assert work(given, 4) == DenseWork(7, 12.0, 24.0, 20.0, 0.0, 0.0)

    def test_scores_and_their_gradients(self):
        loss = LossInventory(scores_per_example=4099 * 129)
        with_scores, without = work(H100_RUN, 2, loss=loss), work(H100_RUN, 2)
        assert with_scores.logits_bytes == 2 * 4099 * 129 * 8
        assert with_scores.forward_flops - without.forward_flops == 2 * 4099 * 129 * 2 * 1024

    def test_a_chunked_loss_has_one_buffer(self):
        loss = LossInventory(scores_per_example=4099 * 50_000, tokens_at_once=1024)
        assert work(H100_RUN, 2, loss=loss).logits_bytes == 1024 * 50_000 * 4
        short = H100_RUN.model_copy(update={"mean_length": 100.0})
        few = LossInventory(scores_per_example=100 * 50_000, tokens_at_once=1024)
        assert work(short, 2, loss=few).logits_bytes == 200 * 50_000 * 4

    def test_everything_but_parameters_grows_with_the_batch(self):
        one, many = work(H100_RUN, 1), work(H100_RUN, 8)
        assert (many.parameters, many.forward_flops) == (one.parameters, 8 * one.forward_flops)
        assert many.activation_bytes == 8 * one.activation_bytes

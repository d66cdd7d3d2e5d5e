"""Parameters, FLOPs and activations of dense parts against published and built models."""

import numpy as np
import pytest
import torch

from gr.config.inventory import (
    DLRMDense,
    GivenDense,
    HSTUDense,
    InventoryConfig,
    LossInventory,
    TableConfig,
    TransformerDense,
)
from gr.config.towers import HSTUConfig
from gr.planner.estimate_dense import DenseWork, dense_work, sequence_flops
from gr.sequence import JaggedSequence
from gr.towers.hstu import HSTU

SEQUENCE = (TableConfig(name="items", rows=10, dim=8, kind="sequence"),)
CRITEO = tuple(TableConfig(name=f"t{i}", rows=10, dim=128) for i in range(26))
# NVIDIA recsys-examples, E2E_BENCHMARK.md: 8 layers, 4 heads x 256, width 1024.
H100_RUN = HSTUDense(layers=8, dim=1024, heads=4, qk_dim=256, v_dim=256, mean_length=4099, max_length=4099)
LLAMA_7B = TransformerDense(layers=32, dim=4096, heads=32, ffn_dim=11008, mean_length=4096, max_length=4096)
LLAMA_70B = TransformerDense(
    layers=80, dim=8192, heads=64, kv_heads=8, ffn_dim=28672, mean_length=4096, max_length=4096
)


def work(dense, batch: int = 1, **fields) -> DenseWork:
    tables = CRITEO if isinstance(dense, DLRMDense) else SEQUENCE
    return dense_work(InventoryConfig(rank_batch_size=batch, tables=tables, dense=dense, **fields), batch)


@pytest.mark.parametrize("dense", [H100_RUN, LLAMA_7B], ids=["hstu", "transformer"])
def test_flops_by_length(dense: HSTUDense | TransformerDense) -> None:
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
        stu = HSTUDense(
            layers=3, dim=512, heads=4, qk_dim=128, v_dim=128, mean_length=4096, max_length=4096, concat_ua=True
        )
        step = work(stu)
        assert step.forward_flops + step.backward_flops == pytest.approx(315.7e9, rel=1e-3)

    def test_the_papers_14_bytes(self):
        step = work(H100_RUN)
        assert step.activation_bytes == 14 * 1024 * 8 * 4099
        assert work(H100_RUN, precision="fp32").activation_bytes == 2 * step.activation_bytes

    def test_heads_of_another_width_than_the_model(self):
        narrow = H100_RUN.model_copy(update={"qk_dim": 32, "v_dim": 64})
        # 2d + 2d + 4 h d_qk + 4 h d_v + 2 h d_v
        assert work(narrow).activation_bytes == (4 * 1024 + 4 * 4 * 32 + 6 * 4 * 64) * 8 * 4099

    @pytest.mark.parametrize("concat_ua", [False, True])
    def test_without_recomputation_it_is_what_autograd_keeps(self, concat_ua):
        D, lengths = 64, [100, 37, 80]
        tower = HSTUConfig(
            layers=2, heads=2, qk_dim=16, v_dim=32, dropout=0.0, position_bias=False, concat_ua=concat_ua
        )
        stack = HSTU(tower, dim=D, max_length=128)
        weights = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        offsets = torch.tensor([0, *lengths]).cumsum(0)
        sequence = JaggedSequence(torch.randn(sum(lengths), D, requires_grad=True), offsets, 128, None, None)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stack(sequence)
        measured = sum(storage.nbytes() for storage in kept.values()) / sum(lengths)
        dense = HSTUDense(
            layers=2,
            dim=D,
            heads=2,
            qk_dim=16,
            v_dim=32,
            mean_length=1,
            max_length=128,
            recompute=False,
            concat_ua=concat_ua,
        )
        mask = 2 * 2 * 32 * 3 if concat_ua else 0  # dropout is off here: a byte an element that enters W_o
        assert measured == pytest.approx(work(dense, precision="fp32").activation_bytes - mask, rel=0.02)


class TestTransformer:
    @pytest.mark.parametrize(("dense", "total"), [(LLAMA_7B, 6_738_415_616), (LLAMA_70B, 68_976_648_192)])
    def test_parameters_of_llama_2(self, dense, total):
        assert work(dense).parameters == total - 2 * 32_000 * dense.dim  # embeddings and head

    def test_flops_of_llama_2_70b(self):
        # 148.2 GFLOP a token, measured at 4096 tokens with every score and the head of 32,000 words.
        causal = work(LLAMA_70B).forward_flops
        future = 80 * 4 * 8192 * 4096 * 4095 / 2
        assert (causal + future) / 4096 + 2 * 32_000 * 8192 == pytest.approx(148.2e9, rel=1e-3)

    def test_the_papers_33_bytes(self):
        dense = TransformerDense(layers=3, dim=512, heads=8, ffn_dim=2048, gated=False, mean_length=100, max_length=100)
        assert work(dense).activation_bytes == 33 * 512 * 3 * 100


class TestDLRM:
    def dlrm(self, interaction: str) -> DLRMDense:
        return DLRMDense(dim=128, bottom=(512, 256, 128), top=(1024, 1024, 512, 256, 1), interaction=interaction)

    def test_mlperf_dlrm_v2(self):
        # 16.04 M parameters; 32 MFLOP a sample forward, two to a multiply-add
        step = work(self.dlrm("dcn"))
        assert step.parameters == 16_044_545
        assert step.forward_flops == pytest.approx(32.06e6, rel=1e-3)
        assert step.backward_flops == 2 * step.forward_flops
        assert step.tokens == 0

    def test_mlperf_dlrm_v1(self):
        # Interaction width 128 + 27 x 26 / 2 = 479; 2.37 M parameters
        top = 479 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256 + 256 + 1
        bottom = 13 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128
        assert work(self.dlrm("dot")).parameters == bottom + top == 2_368_897

    def test_cat(self):
        wider = (27 * 128 - 479) * 1024
        assert work(self.dlrm("cat")).parameters == 2_368_897 + wider

    def test_features_of_one_table_are_vectors_of_their_own(self):
        table = TableConfig(name="shared", rows=10, dim=128, features=26)
        inventory = InventoryConfig(rank_batch_size=1, tables=(table,), dense=self.dlrm("dot"))
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

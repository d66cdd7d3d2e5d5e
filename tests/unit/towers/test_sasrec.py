"""SASRec against a padded definition of its own, and what must hold of any tower."""

import math

import pytest
import torch
from torch import Tensor

from gr.config.towers import SASRecConfig
from gr.sequence import JaggedSequence
from gr.towers import build_tower
from gr.towers.sasrec import SASRec
from tests.support.towers import D, N, check_against, randomised, sequence, to_packed, to_padded

LENGTHS = [4, 0, 1, 9, 2]


def build(dropout: float = 0.0) -> SASRec:
    config = SASRecConfig(layers=2, heads=2, ffn_dim=7, dropout=dropout)
    tower = build_tower(config, dim=D, max_length=N)
    assert isinstance(tower, SASRec)
    return tower


def normalise(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-8).sqrt() * norm.weight + norm.bias


def padded_sasrec(tower: SASRec, seq: JaggedSequence) -> Tensor:
    """arXiv 1808.09781, section 3, as the public re-implementations have it: queries are normalised, keys are not."""
    future_NN = torch.ones(N, N, dtype=torch.bool).triu(1)
    x_BND = to_padded(seq.values_TD, seq.offsets_B1)
    for layer in tower.layers:
        normed = normalise(x_BND, layer.attention_norm)
        query = normed @ layer.query.weight.T + layer.query.bias
        key, value = (x_BND @ layer.key_value.weight.T + layer.key_value.bias).split(D, dim=-1)
        heads = []
        for columns in (slice(0, D // 2), slice(D // 2, D)):
            scores = query[..., columns] @ key[..., columns].mT / math.sqrt(D // 2)
            weights = scores.masked_fill(future_NN, -math.inf).softmax(-1)
            heads.append(weights @ value[..., columns])
        attended = torch.cat(heads, dim=-1) @ layer.attention_output.weight.T + layer.attention_output.bias
        y_BND = normalise(normed + attended, layer.ffn_norm)
        hidden = (y_BND @ layer.ffn_in.weight.T + layer.ffn_in.bias).clamp(min=0)
        x_BND = y_BND + hidden @ layer.ffn_out.weight.T + layer.ffn_out.bias
    return to_packed(normalise(x_BND, tower.last_norm), seq.offsets_B1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_definition(dtype: torch.dtype) -> None:
    check_against(padded_sasrec, build(), sequence(LENGTHS), dtype)


def test_later_tokens_never_change_earlier_outputs() -> None:
    tower = randomised(build()).eval()
    before = sequence([7, 5])
    for cut in (1, 4):
        values = before.values_TD.clone()
        values[cut:7] += 1 + torch.rand(7 - cut, D)
        wanted, got = tower(before).values_TD, tower(before.with_values(values)).values_TD
        assert torch.allclose(got[:cut], wanted[:cut], rtol=1e-12) and torch.allclose(got[7:], wanted[7:], rtol=1e-12)
        assert ((got - wanted)[cut:7].abs() > 1e-3).any(dim=1).all()
        short = JaggedSequence(before.values_TD[:cut], torch.tensor([0, cut]), N)
        assert torch.allclose(tower(short).values_TD, wanted[:cut], rtol=1e-10)


def test_an_example_does_not_see_its_batch_mates() -> None:
    tower = randomised(build()).eval()
    batch = sequence(LENGTHS)
    poisoned = batch.with_values(batch.values_TD.clone())
    poisoned.values_TD[5:14] = torch.nan
    kept = [0, 1, 2, 3, 4, 14, 15]
    assert torch.allclose(tower(poisoned).values_TD[kept], tower(batch).values_TD[kept], rtol=1e-10)


def test_every_parameter_gets_a_gradient() -> None:
    tower = randomised(build())
    weights = torch.randn(12, D, dtype=torch.float64)
    (tower(sequence([N, 3])).values_TD * weights).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_still_give_every_parameter_a_gradient(training: bool) -> None:
    """DDP waits for all of them: None on the one rank without tokens would hang the run."""
    tower = randomised(build(dropout=0.2), torch.float32).train(training)
    out = tower(sequence([0, 0], dtype=torch.float32)).values_TD
    assert out.shape == (0, D)
    out.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_dropout_only_in_training() -> None:
    tower, without = randomised(build(dropout=0.5)), randomised(build())
    seq = sequence(LENGTHS)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(tower.train()(seq).values_TD)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(tower.eval()(seq).values_TD, without.eval()(seq).values_TD)
    assert not torch.equal(outputs[0], without(seq).values_TD)

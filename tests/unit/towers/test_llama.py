"""Llama's tower against Hugging Face's, and what must hold with candidates, a contextual prefix and a cache."""

import pytest
import torch
from torch import Tensor, nn

from gr.config.towers import LLAMA_SIZES, LlamaConfig
from gr.sequence import JaggedSequence
from gr.towers.llama import Llama
from tests.support.llama import VOCABULARY, hf_llama

LENGTHS = [5, 0, 20, 12]
N = 20


def packed(values_TD: Tensor, lengths: list[int] = LENGTHS, **more: object) -> JaggedSequence:
    return JaggedSequence(values_TD, torch.tensor([0, *lengths]).cumsum(0), N, **more)  # type: ignore[arg-type]


def tower(kv_heads: int = 2, dim: int = 16, **changes: object) -> Llama:
    torch.manual_seed(1)
    config = LlamaConfig(layers=2, heads=4, kv_heads=kv_heads, ffn_dim=24, **changes)  # type: ignore[arg-type]
    built = Llama(config, dim=dim, max_length=N).eval()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 4, 4), (64, 8, 4), (96, 6, 1)])
@pytest.mark.parametrize(
    ("std", "tolerance", "of_gradients"), [(0.02, 5e-7, 1e-6), (0.1, 5e-6, 3e-6)], ids=["published", "large"]
)
def test_logits_and_gradients_are_hugging_faces(
    dim: int, heads: int, kv_heads: int, std: float, tolerance: float, of_gradients: float
) -> None:
    """Packed sequences, one of them empty, against left-padded ones with a mask.

    std: of the weights. With the published 0.02 logits are below 1 and attention is nearly flat. With 0.1 logits are up
    to 3.5, and the order of sums shows more: both are then as far from float64 as from each other.
    """
    hf = hf_llama(dim=dim, heads=heads, kv_heads=kv_heads, initializer_range=std)
    config = LlamaConfig(layers=2, heads=heads, kv_heads=kv_heads, ffn_dim=3 * dim // 2)
    own = Llama(config, dim=dim, max_length=N)
    own.load_state_dict(hf.model.state_dict(), strict=False)
    assert {f"model.{name}" for name in own.state_dict()} < set(hf.state_dict())
    lengths = [*LENGTHS, 20, 20]  # 77 tokens: the joint operators compute them
    ids_T = torch.randint(VOCABULARY, (sum(lengths),))
    table_TD, head = hf.model.embed_tokens.weight.detach(), hf.lm_head.weight.detach()
    logits_TV = own(packed(table_TD[ids_T], lengths)).values_TD @ head.T

    parts = ids_T.split(lengths)
    width = max(lengths)
    padded_BN = torch.stack([torch.nn.functional.pad(part, (width - len(part), 0)) for part in parts if len(part)])
    real_BN = torch.stack([torch.arange(width) >= width - len(part) for part in parts if len(part)])
    theirs_TV = hf(input_ids=padded_BN, attention_mask=real_BN.long()).logits[real_BN]
    assert float((logits_TV - theirs_TV).detach().abs().max()) <= tolerance

    weights_TV = torch.randn(logits_TV.shape)
    names = [name for name, _ in own.named_parameters()]
    ours = torch.autograd.grad((logits_TV * weights_TV).sum(), list(own.parameters()))
    reference = torch.autograd.grad((theirs_TV * weights_TV).sum(), [hf.model.get_parameter(name) for name in names])
    for name, gradient, expected in zip(names, ours, reference, strict=True):
        assert float((gradient - expected).abs().max() / expected.abs().max()) <= of_gradients, name


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_joint_operators_compute_what_the_modules_do(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and every gradient, in training, with the same tokens dropped."""
    lengths = [9, 20, 0, 20, 17, 20]
    model = tower(dropout=dropout).train()
    x_TD, grad_TD = torch.randn(sum(lengths), 16, requires_grad=True), torch.randn(sum(lengths), 16)
    results = []
    for fewest in (0, 1000):
        monkeypatch.setattr("gr.towers.llama.FEWEST_FUSED", fewest)
        torch.manual_seed(3)
        out_TD = model(packed(x_TD, lengths)).values_TD
        results.append((out_TD, *torch.autograd.grad(out_TD, [x_TD, *model.parameters()], grad_TD)))
    for joint, composed in zip(*results, strict=True):
        torch.testing.assert_close(joint, composed, rtol=0, atol=2e-6 * float(composed.detach().abs().max()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_tokens_decoded_one_by_one_are_those_of_a_whole_pass(kv_heads: int) -> None:
    model, longer = tower(kv_heads), [9, 4, 24, 16]
    torch.manual_seed(2)
    x_TD = torch.randn(sum(longer), 16)
    with torch.no_grad():
        whole = model(JaggedSequence(x_TD, torch.tensor([0, *longer]).cumsum(0), 24)).values_TD.split(longer)
        parts = x_TD.split(longer)
        begun = torch.cat([part[:length] for part, length in zip(parts, LENGTHS, strict=True)])
        out, cache = model.prefill(packed(begun), capacity=24)
        for part, expected, length in zip(out.values_TD.split(LENGTHS), whole, LENGTHS, strict=True):
            torch.testing.assert_close(part, expected[:length], rtol=0, atol=5e-7)
        for step in range(4):
            x_BD = torch.stack([part[length + step] for part, length in zip(parts, LENGTHS, strict=True)])
            out_BD, cache = model.decode(x_BD, cache)
            expected = torch.stack([each[n + step] for each, n in zip(whole, LENGTHS, strict=True)])
            torch.testing.assert_close(out_BD, expected, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="room for 24 tokens of a sequence, and one is full"):
            model.decode(x_BD, cache)


def test_candidates_see_the_history_and_themselves() -> None:
    """Each candidate's output is that of the token after the history, whatever the other candidates are."""
    model = tower()
    history, candidates = torch.randn(6, 16), torch.randn(3, 16)
    with torch.no_grad():
        together = model(packed(torch.cat([history, candidates]), [9], num_targets_B=torch.tensor([3]))).values_TD
        for i, candidate in enumerate(candidates):
            alone = model(packed(torch.cat([history, candidate[None]]), [7])).values_TD
            torch.testing.assert_close(together[6 + i], alone[6], rtol=0, atol=1e-6)
            torch.testing.assert_close(together[:6], alone[:6], rtol=0, atol=1e-6)


def test_a_contextual_prefix_sees_the_whole_history() -> None:
    model = tower()
    x_TD = torch.randn(8, 16)
    changed = x_TD.clone()
    changed[7] += 1
    with torch.no_grad():
        before, after = (model(packed(x, [8], contextual_len=2)).values_TD for x in (x_TD, changed))
    moved = ((before - after).abs() > 1e-6).any(1).tolist()
    assert moved[:2] == [True, True] and moved[7]


def test_no_tokens_still_reach_every_parameter() -> None:
    model = tower()
    out = model(packed(torch.zeros(0, 16, requires_grad=True), [0, 0])).values_TD
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("size", list(LLAMA_SIZES))
def test_a_size_fills_what_the_paper_states(size: str) -> None:
    config = LlamaConfig(size=size)  # type: ignore[arg-type]
    assert {key: getattr(config, key) for key in LLAMA_SIZES[size] if key != "dim"} == {
        key: value for key, value in LLAMA_SIZES[size].items() if key != "dim"
    }
    assert LlamaConfig.model_validate(config.model_dump()) == config
    config.check_width(LLAMA_SIZES[size]["dim"])


# Embeddings and the output layer of 32,000 ids beside the tower.
@pytest.mark.parametrize(
    ("size", "parameters"),
    [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("34b", 33_743_970_304), ("70b", 68_976_648_192)],
)
def test_parameters_are_those_of_the_published_models(size: str, parameters: int) -> None:
    dim = LLAMA_SIZES[size]["dim"]
    cost = LlamaConfig(size=size).cost(dim, 4096, 2)  # type: ignore[arg-type]
    assert cost.parameters + 2 * 32_000 * dim == parameters


@pytest.mark.parametrize(
    ("given", "dim", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, 16, "kv_heads=3 does not divide heads=4"),
        ({"size": "7b", "layers": 2}, 4096, "size=7b has layers=32, not 2"),
        ({"size": "7b"}, 64, "dim=64 is not that of tower.size=7b, 4096"),
        ({"heads": 4}, 12, "dim=12 is not divisible by twice tower.heads=4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given: dict, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**given).check_width(dim)

"""The Llama tower, forward and backward, beside the LlamaModel of `transformers` on right-padded sequences with a mask.

MovieLens-1M lengths (20 to 200 tokens), and sequences that are all 200 long. Two layers; keys and values shared by two
heads where there are four.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention import lognormal_lengths
from benchmarks.case import Case, Options, lazy
from gr.config.towers import LlamaConfig
from gr.ops.jagged import jagged_to_padded
from gr.sequence import JaggedSequence
from gr.towers.llama import Llama

TESTS = (
    "tests/ops/test_softmax_attention.py",
    "tests/ops/test_rms_norm.py",
    "tests/ops/test_rope.py",
    "tests/ops/test_swiglu.py",
    "tests/unit/towers/test_llama.py",
)
_LONGEST = 200
_SHAPES = ((64, 1, 1, 128), (256, 4, 2, 64))  # D, heads, key heads, sequences


def _sequence(lengths: tuple[int, ...], dim: int, device: str) -> JaggedSequence:
    torch.manual_seed(0)
    values_TD = torch.randn(sum(lengths), dim, device=device, requires_grad=True)
    return JaggedSequence(values_TD, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device), _LONGEST)


def _config(dim: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(layers=2, heads=heads, kv_heads=kv_heads, ffn_dim=2 * dim)


def _step(module: torch.nn.Module, inputs: Tensor, forward: Callable[[], Tensor]) -> Callable[[], object]:
    parameters = [inputs, *(p for p in module.parameters() if p.requires_grad)]
    grad = torch.randn(forward().shape, device=inputs.device)
    return lambda: torch.autograd.grad(forward(), parameters, grad)


def _ours(lengths: tuple[int, ...], device: str, dim: int, heads: int, kv_heads: int) -> Callable[[], object]:
    sequence = _sequence(lengths, dim, device)
    tower = Llama(_config(dim, heads, kv_heads), dim=dim, max_length=_LONGEST).to(device)
    return _step(tower, sequence.values_TD, lambda: tower(sequence).values_TD)


def _padded(lengths: tuple[int, ...], device: str, dim: int, heads: int, kv_heads: int) -> Callable[[], object]:
    """Only the outputs of real tokens have gradients, as in training."""
    import transformers

    sequence, config = _sequence(lengths, dim, device), _config(dim, heads, kv_heads)
    model = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=1,
            hidden_size=dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=_LONGEST,
            attn_implementation="sdpa",
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).to(device)
    model.embed_tokens.requires_grad_(False)
    with torch.no_grad():
        padded_BND = jagged_to_padded(sequence.values_TD, sequence.offsets_B1, _LONGEST)
    padded_BND.requires_grad_()
    real_BN = torch.arange(_LONGEST, device=device) < sequence.offsets_B1.diff()[:, None]
    # Where nothing is padded, no mask is given: transformers then takes the causal kernel.
    mask = None if bool(real_BN.all()) else real_BN.long()
    return _step(
        model, padded_BND, lambda: model(inputs_embeds=padded_BND, attention_mask=mask).last_hidden_state[real_BN]
    )


def cases(options: Options) -> list[Case]:
    chosen = []
    for dim, heads, kv_heads, sequences in _SHAPES:
        for name, lengths in (
            ("MovieLens-1M lengths", lognormal_lengths(sequences)),
            ("all of 200", (_LONGEST,) * (sequences // 2)),
        ):
            arguments = lengths, options.device, dim, heads, kv_heads
            variants: dict[str, Callable[[], object]] = {
                "transformers, padded": lazy(functools.partial(_padded, *arguments)),
                "gr": lazy(functools.partial(_ours, *arguments)),
            }
            title = f"D {dim}, {heads} heads, {kv_heads} of keys, {len(lengths)} sequences, {name}"
            chosen.append(Case(title, variants, "transformers, padded", memory=True))
    return chosen

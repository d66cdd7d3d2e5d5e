"""The loss of a causal language model against its logits, and greedy decoding against whole passes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gr.batch import TokenBatch
from gr.errors import ConfigError
from gr.models import build_model
from gr.models.causal_lm import CausalLM
from gr.models.dense import initialise_dense
from tests.support.text import VOCABULARY, tiny_causal


def built(**sections: dict) -> CausalLM:
    model = build_model(tiny_causal(Path("data"), Path("run"), **sections), None).to_empty(device="cpu")
    initialise_dense(model, 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert isinstance(model, CausalLM)
    return model.eval()


def test_loss_is_that_of_the_scored_logits() -> None:
    torch.manual_seed(0)
    model = built()
    ids_T, targets_T = torch.randint(VOCABULARY, (2, 11))
    scored_T, offsets_B1 = torch.arange(11) % 3 > 0, torch.tensor([0, 4, 4, 11])
    total = model(TokenBatch(ids_T, targets_T, scored_T, offsets_B1))
    losses_T = F.cross_entropy(model.logits(ids_T, offsets_B1), targets_T, reduction="none")
    torch.testing.assert_close(total, losses_T[scored_T].sum())
    total.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_no_tokens_have_no_loss() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    model = built()
    total = model(TokenBatch(nothing, nothing, nothing.bool(), torch.zeros(1, dtype=torch.int64)))
    total.backward()
    assert float(total.detach()) == 0.0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_greedy_tokens_are_those_of_whole_passes() -> None:
    torch.manual_seed(0)
    model = built(data={"max_length": 16})
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    offsets_B1 = torch.tensor([0, *map(len, prompts)]).cumsum(0)
    generated = model.generate(torch.tensor([token for prompt in prompts for token in prompt]), offsets_B1, tokens=8)
    for prompt, own in zip(prompts, generated, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(model.logits(torch.tensor(text), torch.tensor([0, len(text)]))[-1].argmax()))
        assert own == text[len(prompt) :]
    eos = generated[0][2]
    ended = model.generate(torch.tensor(prompts[0]), torch.tensor([0, 3]), tokens=8, eos=eos)[0]
    assert ended == generated[0][: generated[0].index(eos) + 1]


def test_what_cannot_be_generated_is_one_line() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(ConfigError, match=r"a prompt of 2 tokens and 7 more are beyond data.max_length=8"):
        built().generate(ids, torch.tensor([0, 2]), tokens=7)
    with pytest.raises(ConfigError, match="a prompt has no tokens"):
        built().generate(ids, torch.tensor([0, 2, 2]), tokens=1)
    with pytest.raises(ConfigError, match=r"only tower.kind=llama has one"):
        built(model={"tower": {"kind": "sasrec"}}).generate(ids, torch.tensor([0, 2]), tokens=1)

"""Every number of Llama 2's recipe (arXiv 2307.09288), and what a configuration may not say."""

from pathlib import Path

import pytest

from gr.config import load_config
from gr.config.causal_lm import CausalLMConfig
from gr.config.optim import DenseAdamW
from gr.config.towers import LlamaConfig
from gr.errors import ConfigError
from gr.planner.estimate_dense import dense_work
from gr.training.schedule import rate_factor
from tests.support import ROOT
from tests.support.text import tiny_causal, write_text

LLM = ROOT / "configs/llm"


def loaded(name: str) -> CausalLMConfig:
    config = load_config(LLM / f"{name}.yaml")
    assert isinstance(config, CausalLMConfig)
    return config


# Table 1 and section 2.2: peak rate; layers, width, heads, key heads of the models. The last: all parameters.
@pytest.mark.parametrize(
    ("size", "rate", "layers", "dim", "heads", "kv_heads", "parameters"),
    [
        ("7b", 3.0e-4, 32, 4096, 32, 32, 6_738_415_616),
        ("13b", 3.0e-4, 40, 5120, 40, 40, 13_015_864_320),
        ("34b", 1.5e-4, 48, 8192, 64, 8, 33_743_970_304),
        ("70b", 1.5e-4, 80, 8192, 64, 8, 68_976_648_192),
    ],
)
def test_pretraining_is_the_papers(
    size: str, rate: float, layers: int, dim: int, heads: int, kv_heads: int, parameters: int
) -> None:
    config = loaded(f"{size}-pretrain")
    tower, optimizer, trainer = config.model.tower, config.optimizer, config.trainer
    assert isinstance(tower, LlamaConfig) and isinstance(optimizer, DenseAdamW)
    assert (tower.layers, config.model.dim, tower.heads, tower.key_heads) == (layers, dim, heads, kv_heads)
    assert (config.model.vocabulary, config.data.max_length) == (32_000, 4096)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.95), 1e-5, 0.1)
    assert (optimizer.lr, optimizer.clip_grad_norm) == (rate, 1.0)
    assert (optimizer.schedule.kind, optimizer.schedule.warmup_steps) == ("cosine", 2000)
    assert trainer.steps is not None
    assert rate_factor(optimizer.schedule, trainer.steps, trainer.steps) == pytest.approx(0.1)
    tokens = trainer.global_batch_size * config.data.max_length
    assert tokens == pytest.approx(4e6, rel=0.05)
    assert trainer.steps * tokens == pytest.approx(2.0e12, rel=1e-5)
    assert dense_work(config.inventory(config.planning_schema()), 1).parameters == parameters


def test_fine_tuning_is_the_papers() -> None:
    """Section 3.1: cosine from 2e-5, weight decay .1, 64 sequences of 4,096 tokens, 2 epochs."""
    config = loaded("7b-sft")
    assert isinstance(config.optimizer, DenseAdamW)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.schedule.kind) == (2e-5, 0.1, "cosine")
    assert (config.trainer.global_batch_size, config.data.max_length, config.trainer.epochs) == (64, 4096, 2)


def test_another_vocabulary_than_the_tokenizers_is_one_line(tmp_path: Path) -> None:
    config = tiny_causal(write_text(tmp_path / "data", [[1, 2]]), tmp_path / "run", model={"vocabulary": 24})
    with pytest.raises(ConfigError, match=r"model.vocabulary=24, but the tokenizer of .* has 23 ids: set it to that"):
        config.load_schema()


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"kind": "hstu", "time_bias": True}, "reads timestamps"),
        ({"kind": "hstu", "divisor": "actual_len"}, "tells a token how many come after it"),
        ({"kind": "llama", "heads": 3}, "dim=8 is not divisible by twice tower.heads=3"),
    ],
)
def test_towers_that_do_not_fit_text_are_refused(tmp_path: Path, tower: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_causal(tmp_path, tmp_path, model={"tower": tower})

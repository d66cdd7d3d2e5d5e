"""Hugging Face's Llama, small and with random weights, where `transformers` is installed."""

from types import ModuleType
from typing import Any

import pytest
import torch

VOCABULARY = 91


def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="transformers (extra `dev`) is not installed")


def hf_llama(*, dim: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 4, **changes: Any) -> Any:
    """A LlamaForCausalLM in float32 and evaluation mode, whose scores are not too small to be seen."""
    hf = transformers()
    config = hf.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": dim,
            "intermediate_size": 3 * dim // 2,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.1,
            **changes,
        }
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()

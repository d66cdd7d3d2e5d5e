"""Models: embeddings, tower and task put together on a single device. Sharding is applied beside them (gr.parallel)."""

from typing import Any

import torch
from torch import nn

from gr.config.base import import_target
from gr.config.run import RunConfig


def build_model(config: RunConfig, schema: Any) -> nn.Module:
    """The model that `config` describes for data of `schema`, without storage (on meta)."""
    with torch.device("meta"):
        return import_target(config.model_target)(config, schema)


__all__ = ["build_model", "import_target"]

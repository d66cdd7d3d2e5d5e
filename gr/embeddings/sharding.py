"""Applies a sharding plan: a single-device model on meta becomes a DistributedModelParallel on this rank's device."""

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from gr import compat
from gr.config.tree import EmbeddingsConfig
from gr.embeddings.optimizers import fused_params


def sequence_sharder(config: EmbeddingsConfig) -> EmbeddingCollectionSharder:
    """The sharder of the sequence tables, which also carries their fused optimizer."""
    return EmbeddingCollectionSharder(fused_params=fused_params(config.optimizer))


def shard_tables(
    model: nn.Module, plan: ShardingPlan, config: EmbeddingsConfig, device: torch.device
) -> DistributedModelParallel:
    """Shards the tables by `plan`, materialises the rest on `device` and replicates it with DDP.

    Table weights are left as TorchRec's random start (see initialise_tables); dense parameters come from each
    module's reset_parameters, on this rank's generator.
    """
    compat.apply()
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(torch.distributed.group.WORLD),
        device=device,
        plan=plan,
        sharders=[sequence_sharder(config)],
    )

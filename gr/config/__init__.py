"""An experiment's configuration: its typed tree; reading and writing it (load); comparing two (compare)."""

from gr.config.compare import differences
from gr.config.generative import GenerativeConfig
from gr.config.load import Experiment, dump_config, json_schema, load_config
from gr.config.ranking import RankingConfig
from gr.config.tree import ExperimentConfig

__all__ = [
    "Experiment",
    "ExperimentConfig",
    "GenerativeConfig",
    "RankingConfig",
    "differences",
    "dump_config",
    "json_schema",
    "load_config",
]

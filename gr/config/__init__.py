"""An experiment's configuration: its typed tree; reading and writing it (load); comparing two (diff)."""

from gr.config.click import ClickConfig
from gr.config.diff import differences
from gr.config.load import RECIPES, dump_config, json_schema, load_config
from gr.config.ranking import RankingConfig
from gr.config.retrieval import RetrievalConfig
from gr.config.run import RunConfig

__all__ = [
    "RECIPES",
    "ClickConfig",
    "RankingConfig",
    "RetrievalConfig",
    "RunConfig",
    "differences",
    "dump_config",
    "json_schema",
    "load_config",
]

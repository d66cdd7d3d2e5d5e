"""An experiment's configuration: its typed tree; reading and writing it (load); comparing two (compare)."""

from gr.config.compare import differences
from gr.config.load import dump_config, json_schema, load_config
from gr.config.tree import ExperimentConfig

__all__ = ["ExperimentConfig", "differences", "dump_config", "json_schema", "load_config"]

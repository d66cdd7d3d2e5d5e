"""An experiment's configuration: the typed tree (tree), and reading, writing and describing it (load)."""

from gr.config.load import dump_config, json_schema, load_config
from gr.config.tree import ExperimentConfig

__all__ = ["ExperimentConfig", "dump_config", "json_schema", "load_config"]

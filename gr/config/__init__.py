"""An experiment's configuration: its typed tree; reading and writing it (load); comparing two (diff).

The functions and classes of __all__ are imported when they are first used: a package that is served reads one section,
and does not wait for all of them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gr.config.click import ClickConfig
    from gr.config.diff import differences
    from gr.config.load import RECIPES, dump_config, json_schema, load_config
    from gr.config.ranking import RankingConfig
    from gr.config.retrieval import RetrievalConfig
    from gr.config.run import RunConfig

_MODULES = {
    "RECIPES": "load",
    "ClickConfig": "click",
    "RankingConfig": "ranking",
    "RetrievalConfig": "retrieval",
    "RunConfig": "run",
    "differences": "diff",
    "dump_config": "load",
    "json_schema": "load",
    "load_config": "load",
}
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


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'gr.config' has no attribute '{name}'")
    return getattr(importlib.import_module(f"gr.config.{_MODULES[name]}"), name)

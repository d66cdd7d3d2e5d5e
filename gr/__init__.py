"""gr: training of sparse recommender models on torch and torchrec. Importing the package imports no torch.

The functions of __all__ are those of docs/python.md; each is imported when it is first used.
"""

__version__ = "0.1.0"

_PUBLIC = {
    "embed": "gr.api",
    "evaluate": "gr.api",
    "load": "gr.models.saved",
    "load_config": "gr.config",
    "plan": "gr.api",
    "predict": "gr.api",
    "prepare_events": "gr.api",
    "raw_ids": "gr.data.raw_ids",
    "recommend": "gr.api",
    "train": "gr.api",
}
__all__ = [
    "embed",
    "evaluate",
    "load",
    "load_config",
    "plan",
    "predict",
    "prepare_events",
    "raw_ids",
    "recommend",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gr' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

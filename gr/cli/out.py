"""The file that a command writes."""

import importlib.util
from pathlib import Path

from gr.errors import ConfigError, InstallError

_PICTURES = (".png", ".pdf", ".svg")


def check_out(out: Path, force: bool) -> None:
    """Raises ConfigError where the file of --out is there already, or cannot be."""
    if out.exists() and not force:
        raise ConfigError(f"--out={out} exists: name another file, or replace it with --force")
    if not out.parent.is_dir():
        raise ConfigError(f"--out={out}: there is no folder {out.parent}; make it first")


def check_picture(out: Path) -> None:
    """Raises ConfigError where the file of --picture cannot be written, InstallError where nothing can draw it."""
    if not out.parent.is_dir():
        raise ConfigError(f"--picture={out}: there is no folder {out.parent}; make it first")
    if out.suffix not in _PICTURES:
        raise ConfigError(f"--picture={out}: name a file that ends in {' or '.join(_PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InstallError("--picture needs matplotlib: install it with `pip install 'gr[plot]'`")

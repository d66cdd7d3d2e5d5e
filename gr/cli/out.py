"""The file that a command writes."""

from pathlib import Path

from gr.errors import ConfigError


def check_out(out: Path, force: bool) -> None:
    """Raises ConfigError where the file of --out is there already, or cannot be."""
    if out.exists() and not force:
        raise ConfigError(f"--out={out} exists: name another file, or replace it with --force")
    if not out.parent.is_dir():
        raise ConfigError(f"--out={out}: there is no folder {out.parent}; make it first")

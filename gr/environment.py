"""Whole numbers in environment variables, by which torchrun and schedulers tell a process its place."""

import os

from gr.errors import ConfigError


def whole_number(name: str, default: int, *, least: int = 0, most: int = 2**31 - 1) -> int:
    """The number in the variable `name`, `default` where it is not set. Raises ConfigError for anything else in it."""
    text = os.environ.get(name)
    if text is None:
        return default
    # isdecimal takes digits of every script, and int reads none of a number beyond 4,300 of them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and least <= int(text) <= most):
        raise ConfigError(
            f"{name}={text[:40]} in the environment: expected a whole number from {least} to {most}, as torchrun sets "
            f"it; unset {name} to run one process"
        )
    return int(text)

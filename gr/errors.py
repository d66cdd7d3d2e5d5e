"""Errors a user can cause. Each message says what was wrong, where, what is allowed and what to do."""

import difflib
from collections.abc import Collection


def printable(text: str) -> str:
    """`text` on one line, with every control, separating or unassigned character written as its escape.

    Names come from files and arguments of others: an ESC would command the terminal, a line break would forge a line.
    The rule is that of repr, without quotes and without doubled backslashes, so that a second time changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def nearest(name: str, known: Collection[str], label: str) -> str:
    """The end of a message on an unknown name: the nearest known one, where one is near, and all of them."""
    listing = f"{label}: {', '.join(known) or 'none'}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'? ({listing})" if near else listing


class GRError(Exception):
    """Base of every error that the CLI prints as one message, without a traceback.

    The message is one line, and each further argument an indented one below it; names in them are shown `printable`.
    """

    def __str__(self) -> str:
        return "\n  ".join(printable(str(line)) for line in self.args)


class ConfigError(GRError):
    """The experiment's configuration is wrong."""


class TransientError(GRError):
    """A failure that another try of the same command may cure: other ranks are out of reach, run_dir is in use."""


class DataError(GRError):
    """Input data is missing, malformed or does not match its schema."""


class PlanError(GRError):
    """No sharding plan can be made, or a plan does not fit the model or topology."""


class CheckpointError(GRError):
    """A checkpoint cannot be read, or does not fit the model."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cut off or not what was written."""


class TrainingError(GRError):
    """Training cannot go on, for example because the loss is not finite."""


class ServingError(GRError):
    """A model cannot be exported or served, a package is not what it says, or a request cannot be answered."""


class InstallError(GRError):
    """The installed packages do not fit together."""

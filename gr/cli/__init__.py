"""The command line. A user's mistake is one message on stderr; only a mistake of ours shows a traceback.

exit code   meaning
0           done
1           done, and the answer is no: `doctor` found a fault, `config diff` a difference; a bug, with a traceback;
            what may pass: a rank of `train` that does not reach the others, a run_dir in use
2           the command, configuration, data or installation is wrong: `error: ...` says what and the remedy
3           `plan`: the model does not fit the machine
130         interrupted by Ctrl-C
"""

import os
import sys
from collections.abc import Sequence

import click

from gr import __version__
from gr.cli.lazy import LazyGroup
from gr.cli.out import say
from gr.errors import GRError, TransientError
from gr.files import DISK_FULL, NO_RIGHT, OF_ANOTHER_KIND, is_transient

_COMMANDS = {
    "train": ("gr.cli.train:command", "Train the experiment of a configuration."),
    "status": ("gr.cli.status:command", "Show how a run stands, from its folder."),
    "checkpoint": ("gr.cli.show_checkpoint:command", "Look at checkpoints: what is in one."),
    "evaluate": ("gr.cli.evaluate:command", "Evaluate a checkpoint on held-out data."),
    "recommend": ("gr.cli.recommend:command", "Write the best items of every user, from a checkpoint."),
    "predict": ("gr.cli.predict:command", "Write a model's predictions beside the rows of a file."),
    "embed": ("gr.cli.embed:command", "Write the vectors of items and users, from a checkpoint."),
    "export-weights": ("gr.cli.export_weights:command", "Write the weights of a checkpoint as safetensors."),
    "import-hf": ("gr.cli.import_hf:command", "Read a Llama of Hugging Face as a checkpoint."),
    "export-hf": ("gr.cli.export_hf:command", "Write a Llama for Hugging Face, from a checkpoint."),
    "export": ("gr.cli.export:command", "Write a checkpoint as a package to serve it from."),
    "publish": ("gr.cli.publish:command", "Write new weights into a package, or what changed as a delta."),
    "apply": ("gr.cli.apply:command", "Put deltas on a checkpoint."),
    "serve": ("gr.cli.serve:command", "Answer requests with a package over HTTP."),
    "bench": ("gr.cli.bench:command", "Find how many requests a second a package answers in time."),
    "numerics": ("gr.cli.numerics:command", "Show what fewer bits change, layer by layer."),
    "plan": ("gr.cli.plan:command", "Plan where tables go; predict memory and step time."),
    "calibrate": ("gr.cli.calibrate:command", "Measure this machine and write a topology file for `gr plan`."),
    "prepare": ("gr.cli.prepare:command", "Turn your own log, or a public data set, into a data folder."),
    "data": ("gr.cli.data:command", "Look at data folders: what is in one, and what is wrong with it."),
    "compare": ("gr.cli.compare:command", "Compare runs: configurations, metrics, a paired test, curves."),
    "baselines": ("gr.cli.baselines:command", "Score popularity, item-kNN, Markov and EASE^R on the same split."),
    "scale": ("gr.cli.scale:command", "Run a grid of sizes and budgets; fit scaling laws to it."),
    "smoke": ("gr.cli.smoke:command", "Train, evaluate and resume on generated data."),
    "config": ("gr.cli.config:command", "List, show, check, compare or explain configurations."),
    "doctor": ("gr.cli.doctor:command", "Check that the installed packages fit together."),
}


@click.group(cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gr")
def command() -> None:
    """gr: sparse recommender models on torch and torchrec."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A command may return an integer to set it."""
    try:
        result = command.main(arguments, prog_name="gr", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        say(f"error: {_hinted(error)}", err=True)
        return 2
    except GRError as error:
        first, *more = str(error).splitlines()  # its own line breaks: those of names are escaped in it
        say(f"error: {first}", *more, err=True)
        return 1 if isinstance(error, TransientError) else 2
    except (click.Abort, KeyboardInterrupt):
        say("interrupted", err=True)
        return 130
    except BrokenPipeError:  # `gr config show ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        say(f"error: needs more memory than there is: {error}; lower the sizes, or use a larger machine", err=True)
        return 2
    except (ImportError, OSError) as error:
        if _is_installation(error):
            say(f"error: {error}", "Run `gr doctor`: it names the package that is wrong and the remedy.", err=True)
            return 2
        if not isinstance(error, OSError) or (remedy := _remedy(error)) is None:
            raise
        say(f"error: {error.filename or 'the system'}: {error.strerror}; {remedy}", err=True)
        return 1 if is_transient(error) else 2
    return result if isinstance(result, int) else 0


def _hinted(error: click.ClickException) -> str:
    """The message of click; for an option that a command does not have, how a value of the configuration is written."""
    message = error.format_message()
    if not isinstance(error, click.NoSuchOption) or error.ctx is None or error.possibilities:
        return message
    if not any(parameter.name == "overrides" for parameter in error.ctx.command.params):
        return message
    key = error.option_name.lstrip("-")
    return f"{message.rstrip('.')}; a value of the configuration has no dashes: {key}=VALUE"


def _remedy(error: OSError) -> str | None:
    """None where it is our mistake, as a missing file is: those of users are looked for."""
    if is_transient(error):
        return "another try may help"
    if error.errno in DISK_FULL:
        return "make room, then start the same command again"
    if error.filename is None:
        return None
    if error.errno in NO_RIGHT:
        return "name another path, or mend its owner or its mount"
    return "correct the path, then start the same command again" if error.errno in OF_ANOTHER_KIND else None


def _is_installation(error: ImportError | OSError) -> bool:
    """A third-party module is missing or its shared library does not load; not a mistake of ours, nor of a file."""
    if isinstance(error, ImportError):
        return (error.name or "").split(".")[0] != "gr"
    return ".so" in str(error) and error.filename is None

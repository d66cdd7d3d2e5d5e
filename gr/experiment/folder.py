"""The run folder: one run at a time writes into it, and status.json says what became of that run."""

import fcntl
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gr
from gr.checkpoint import CheckpointFolder
from gr.checkpoint.layout import CONFIG
from gr.config import dump_config
from gr.config.tree import RunConfig
from gr.dist import World
from gr.errors import ConfigError, GRError, TrainingError
from gr.files import DISK_FULL, may_pass, write_text
from gr.logging import get_logger
from gr.status import STATUS, RunError, RunStatus, StatusFile, read_status

log = get_logger(__name__)
CHECKPOINTS = "checkpoints"


@contextmanager
def run_folder(config: RunConfig, world: World) -> Iterator[None]:
    """Makes run_dir, keeps a second run out, and records in status.json how this one starts and whether it fails.

    A GRError on any rank is a failure that trying again will not cure. Everything else leaves "running" behind, as a
    kill does. Raises ConfigError where the folder cannot be written or is in use. Collective.
    """
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        refusal = ""
        if world.is_main:
            try:
                stack.enter_context(_locked(run_dir))
                _start(config, world)
            except GRError as error:
                refusal = str(error)
            except OSError as error:
                if may_pass(error):
                    raise
                refusal = f"run_dir={run_dir} cannot be written: {error.strerror}; set another one"
        # Also a barrier: no rank may fail before its status is there to say so.
        refusal = world.from_main(refusal)
        if refusal:
            raise ConfigError(refusal)
        try:
            yield
        except GRError as error:
            _record(run_dir, world, str(error))
            raise
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            message = f"run_dir={run_dir}: {error.strerror}: make room, then start the same command again"
            _record(run_dir, world, message)
            raise TrainingError(message) from error
        except RuntimeError as error:  # a collective broke, maybe because a rank left with a failure
            failure = _failure(run_dir)
            if failure is None:
                raise
            raise TrainingError(f"rank {failure.rank} on {failure.host} failed: {failure.message}") from error


def write_config(config: RunConfig) -> None:
    """config.yaml: the resolved configuration, under the commit it ran from."""
    write_text(Path(config.run_dir) / CONFIG, f"# gr {gr.__version__}{_commit()}\n{dump_config(config)}")


def _commit() -> str:
    """Of the checkout that gr runs from, marked -dirty where files were changed; empty where there is none."""
    root = Path(gr.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("config.yaml will not name the git commit of %s: %s", root, error)
        return ""
    return f", git {done.stdout.strip()}"


def _start(config: RunConfig, world: World) -> None:
    """Raises TrainingError in a worker that torchrun restarted after a failure that a restart will not cure."""
    run_dir = Path(config.run_dir)
    status = StatusFile(run_dir)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (failure := _failure(run_dir)):
        raise TrainingError(f"not tried again: {failure.message}")
    saved = CheckpointFolder(run_dir / CHECKPOINTS).steps()
    status.start(
        RunStatus(
            "running",
            step=saved[-1] if saved else 0,
            steps=config.trainer.steps,
            world_size=world.size,
            checkpoint=saved[-1] if saved else None,
        )
    )


def _failure(run_dir: Path) -> RunError | None:
    """What status.json says of a failure, if there is one."""
    if not (run_dir / STATUS).exists():
        return None
    status = read_status(run_dir)
    return status.error if status.state == "failed" else None


def _record(run_dir: Path, world: World, message: str) -> None:
    try:
        StatusFile(run_dir).fail(RunError(world.rank, socket.gethostname(), message))
    except (GRError, OSError) as error:
        log.error("status.json cannot say that this run failed: %s", error)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        if may_pass(error):
            raise
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}; set another one") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"run_dir={run_dir} is in use by another run: stop it, or set another one") from error
        yield

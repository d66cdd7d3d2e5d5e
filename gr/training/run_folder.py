"""The run folder: one run at a time writes into it, and status.json says what became of that run."""

import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import gr
from gr.checkpoint import CheckpointFolder
from gr.checkpoint.layout import CHECKPOINTS, CONFIG
from gr.config import dump_config
from gr.config.run import RunConfig
from gr.dist import World
from gr.environment import whole_number
from gr.errors import ConfigError, GRError, TrainingError, TransientError
from gr.files import DISK_FULL, is_transient, write_text
from gr.logging import get_logger, log_once
from gr.schema import SCHEMA_FILE
from gr.status import STATUS, RunError, RunStatus, StatusFile, read_status
from gr.training.signals import Interrupted, on_stop_signal

log = get_logger(__name__)
# How long torchrun's next attempt waits for ranks that lost their torchrun: they finish a step and save.
ATTEMPT_BEFORE_SECONDS = 60.0


@contextmanager
def run_folder(config: RunConfig, world: World) -> Iterator[None]:
    """Makes run_dir, keeps a second run out, and records in status.json how this one starts and whether it fails.

    A GRError on any rank is a failure that trying again will not cure. A signal to stop that no step loop hears ends
    what is inside, and leaves "stopped". Everything else leaves "running" behind, as a kill does. Raises ConfigError
    where the folder cannot be written or is in use. Collective.
    """
    run_dir = Path(config.run_dir)
    requested = False

    def ask() -> None:
        nonlocal requested
        requested = True
        raise Interrupted

    with ExitStack() as stack:
        _enter(stack, config, world)
        try:
            with on_stop_signal(ask):
                yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # Whatever the interruption became on its way: torch wraps what ends a load, and tells all ranks.
            if requested or isinstance(error, Interrupted):
                first = _first(error)
                # An ordinary error before the signal: its peer has stopped and left, or else this rank had crashed
                # already, and torchrun sent the signal for that.
                if not isinstance(first, Exception) or _state(run_dir) == "stopped":
                    _record_stop(run_dir)
                    return
                error = first
            failure = _failure_of(error, run_dir, world)
            if failure is None or failure is error:
                raise error
            raise failure from error


def _enter(stack: ExitStack, config: RunConfig, world: World) -> None:
    """Locks run_dir on the main rank for as long as `stack` lasts.

    Raises ConfigError on every rank where it cannot be written, TransientError where it is in use.
    """
    refusal, passes, run_dir = "", False, Path(config.run_dir)
    if world.is_main:
        try:
            stack.enter_context(_locked(run_dir, ATTEMPT_BEFORE_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0))
            _start(config, world)
        except GRError as error:
            refusal, passes = str(error), isinstance(error, TransientError)
        except OSError as error:
            if is_transient(error):
                raise
            refusal = f"run_dir={run_dir} cannot be written: {error.strerror}; set another one"
    # Also a barrier: no rank may fail before its status is there to say so.
    refusal, passing = world.from_main(refusal), world.from_main("yes" if passes else "")
    if refusal:
        raise (TransientError if passing else ConfigError)(refusal)


def _first(error: BaseException) -> BaseException:
    """The first error of the chain that led to `error`."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _failure_of(error: BaseException, run_dir: Path, world: World) -> GRError | None:
    """`error` as a failure that trying again will not cure, recorded where this rank met it first; None for a crash."""
    if isinstance(error, RuntimeError):  # a collective broke, maybe because a rank left with a failure
        if (first := _failure(run_dir)) is None:
            return None
        return TrainingError(f"rank {first.rank} on {first.host} failed: {first.message}")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        error = TrainingError(f"run_dir={run_dir}: {error.strerror}: make room, then start the same command again")
    if isinstance(error, FileNotFoundError) and (gone := _removed(error, run_dir)):
        error = TrainingError(
            f"{gone} was removed while the run wrote into it: start the same command again, from its last checkpoint "
            "where one is left"
        )
    if isinstance(error, OSError) and not is_transient(error) and _is_in(error, run_dir):
        error = TrainingError(f"{error.filename}: {error.strerror}; correct it, then start the same command again")
    if not isinstance(error, GRError):
        return None
    _record(run_dir, RunError(world.rank, socket.gethostname(), str(error)))
    return error


def _is_in(error: OSError, run_dir: Path) -> bool:
    return error.filename is not None and Path(str(error.filename)).is_relative_to(run_dir)


def write_config(config: RunConfig) -> None:
    """config.yaml: the resolved configuration, under the commit it ran from."""
    write_text(Path(config.run_dir) / CONFIG, f"# gr {gr.__version__}{_commit()}\n{dump_config(config)}")


def _commit() -> str:
    """The commit of the checkout that gr runs from, marked -dirty where files were changed.

    Without a checkout, it is GR_COMMIT, which images set.
    """
    root = Path(gr.__file__).parent.parent
    if not (root / ".git").exists():
        return f", git {commit}" if (commit := os.environ.get("GR_COMMIT")) else ""
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
    if whole_number("TORCHELASTIC_RESTART_COUNT", 0) and (failure := _failure(run_dir)):
        raise TrainingError(f"not tried again: {failure.message}")
    status.start(_status(config, world.size))


def _status(config: RunConfig, world_size: int) -> RunStatus:
    """The status of a run that starts where its last checkpoint is."""
    saved = CheckpointFolder(Path(config.run_dir) / CHECKPOINTS).steps()
    return RunStatus(
        "running",
        step=saved[-1] if saved else 0,
        steps=config.trainer.steps or 0,
        world_size=world_size,
        checkpoint=saved[-1] if saved else None,
    )


def _failure(run_dir: Path) -> RunError | None:
    """The failure that status.json tells of, if there is one."""
    if not (run_dir / STATUS).exists():
        return None
    try:
        status = read_status(run_dir)
    except GRError as error:  # it tells of none
        log.warning("%s", error)
        return None
    return status.error if status.state == "failed" else None


def _state(run_dir: Path) -> str:
    """The state in status.json; empty where the file is no status."""
    try:
        return read_status(run_dir).state
    except GRError as error:
        log.warning("%s", error)
        return ""


def _removed(error: FileNotFoundError, run_dir: Path) -> Path | None:
    """The folder of the run that is gone, if `error` comes from that."""
    if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(run_dir):
        return None
    return next((each for each in (run_dir, run_dir / CHECKPOINTS) if not each.exists()), None)


def record_refusal(config: RunConfig, error: GRError) -> None:
    """Says in status.json why this rank cannot join the others, unless a run is in the folder."""
    run_dir, failure = Path(config.run_dir), RunError(whole_number("RANK", 0), socket.gethostname(), str(error))
    try:
        with _locked(run_dir, 0):
            status = _status(config, whole_number("WORLD_SIZE", 1, least=1))
            StatusFile(run_dir).start(replace(status, state="failed", error=failure))
    except (GRError, OSError) as fault:
        log.info("status.json does not say why this rank cannot join: %s", fault)


def _record(run_dir: Path, failure: RunError) -> None:
    try:
        StatusFile(run_dir).fail(failure)
    except (GRError, OSError) as error:
        log.error("status.json cannot say that this run failed: %s", error)


def _record_stop(run_dir: Path) -> None:
    """A run that was done, or had failed, when the signal came stays so."""
    log.warning("stopped outside the steps, so nothing was to be saved; the same command starts at the last checkpoint")
    if _state(run_dir) in ("running", ""):
        StatusFile(run_dir).update(state="stopped")


@contextmanager
def _locked(run_dir: Path, patience: float) -> Iterator[None]:
    """patience: seconds to wait for a run that is in the folder."""
    if (run_dir / SCHEMA_FILE).is_file():  # --force of gr prepare replaces the folder with all that is in it
        raise ConfigError(f"run_dir={run_dir} is a data folder, as it has {SCHEMA_FILE}; set another one")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        if is_transient(error):
            raise
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}; set another one") from error
    deadline = time.monotonic() + patience
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise TransientError(
                        f"run_dir={run_dir} is in use by another run: stop it, or set another one"
                    ) from error
                log_once(log, f"run_dir={run_dir} is in use: waiting {patience:g} s for that run to leave")
                time.sleep(0.2)
            except OSError as error:
                if is_transient(error):
                    raise
                raise ConfigError(
                    f"run_dir={run_dir} has no locks ({error.strerror}): mount it with flock, or set another one"
                ) from error
        yield

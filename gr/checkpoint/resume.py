"""The checkpoint that a run resumes from: whole, or else set aside for the one before."""

from pathlib import Path

from gr import watchdog
from gr.checkpoint.checksums import find_damage
from gr.checkpoint.layout import SHARED, CheckpointFolder, read_progress, resolve
from gr.dist import World
from gr.errors import CheckpointError, DamagedCheckpointError
from gr.files import is_transient
from gr.logging import get_logger

log = get_logger(__name__)


def verify(path: Path, world: World) -> None:
    """Raises DamagedCheckpointError on every rank where a file of a checkpoint is not what was written. Collective.

    Raises CheckpointError or OSError, on the rank that met it, where a file is there and cannot be read, and for a
    checkpoint of another format.
    """
    try:
        damage = find_damage(path, SHARED, world.rank, world.size)
    except OSError as error:
        if is_transient(error):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error}; mend its owner or its mount") from error
    if faults := [fault for fault in world.gather_text(damage) if fault]:
        raise DamagedCheckpointError(f"{faults[0]}; restore that file, or remove {path} to use the one before")
    read_progress(path)


def resume_from(folder: Path, load_from: str | None, world: World) -> Path | None:
    """The newest undamaged checkpoint under `folder`, or else the one that load_from names; None where there is none.

    Damaged ones of the run are set aside for the one before. Raises DamagedCheckpointError where there is none before,
    or load_from is damaged. Collective.
    """
    checkpoints = CheckpointFolder(folder)
    steps = [int(step) for step in world.from_main(" ".join(map(str, checkpoints.steps()))).split()]
    for step in reversed(steps):
        path = checkpoints.final(step)
        watchdog.enter(f"verifying {path}")
        try:
            verify(path, world)
        except DamagedCheckpointError as error:
            if step == steps[0]:
                raise
            aside = checkpoints.set_aside(step) if world.is_main else path
            log.warning("%s. Resuming from the one before; the damaged one is now %s", error, aside)
            continue
        return path
    if load_from is None:
        return None
    path = Path(world.from_main(str(resolve(load_from)) if world.is_main else ""))
    verify(path, world)
    return path

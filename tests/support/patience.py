"""Waiting for what another process does: for the event itself, within a limit that only a hang reaches."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 900  # also on a machine that has far more to do than cores
LOOK_SECONDS = 0.05


def until(
    what: str,
    there: Callable[[], object],
    *,
    report: Callable[[], str] = lambda: "",
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Returns once `there()` holds. Raises AssertionError, with the report, where that takes too long.

    alive: whether it can still come to that; where it cannot, there is no more waiting.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not there():
        # What ends may have done it just before.
        if not alive() and not there():
            raise AssertionError(f"ended, and not {what}:\n{report()}")
        if time.monotonic() > deadline:
            raise AssertionError(f"not {what} after {PATIENCE_SECONDS} s:\n{report()}")
        time.sleep(LOOK_SECONDS)

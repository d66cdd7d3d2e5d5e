"""Follows a run: whichever checkpoint becomes the one to serve is published.

To import torch and torchrec takes ten times as long as to publish, and here it is done once.
"""

import time
from collections.abc import Collection, Iterator
from pathlib import Path

from gr.checkpoint import resolve
from gr.errors import GRError, TransientError
from gr.files import is_transient
from gr.logging import get_logger
from gr.serving.export import Exported, publish

log = get_logger(__name__)


def follow(run: str | Path, to: str | Path, seconds: float, *, plugins: Collection[str] = ()) -> Iterator[Exported]:
    """Yields what was published, without end. run: a run folder; its best checkpoint is published, or else its latest.

    seconds: between looks at the run. Raises for the first checkpoint what publish does. A later one that cannot be
    published, as when the accuracy gate fails, is logged, and the version before it is still served.
    """
    done = resolve(run)
    yield publish(done, to, plugins=plugins)
    while True:
        time.sleep(seconds)
        if (newest := resolve(run)) == done:
            continue
        try:
            exported = publish(newest, to, plugins=plugins)
        except (GRError, OSError) as error:
            if isinstance(error, TransientError) or is_transient(error):
                log.warning("%s; looks again", error)
                continue
            log.error("%s is not published: %s", newest, error)
        else:
            yield exported
        done = newest

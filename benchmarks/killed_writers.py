"""Kills `gr publish` and `gr export` with SIGKILL, each time at another file operation, and opens the package.

    python -m benchmarks.killed_writers RUN OTHER_RUN [--kills 100] [--export 10]

RUN and OTHER_RUN are two runs of one form. Whichever is not served is published, and killed before one of the file
operations that it does in the package, from the first to the last. After each kill the package is opened as a server
opens it, with all SHA-256 and golden rows: what it serves must be whole, and be the version of before or the new one.
--export: so many further kills of an export that compiles.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from gr.config.export import load_export_config
from gr.serving.export import export, publish
from gr.serving.package.version import Version
from gr.serving.package.writer import writing

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree")


def operations(package: Path, work: Callable[[], object], kill_at: int | None) -> int:
    """Runs `work` in a process of its own, which is killed before file operation `kill_at`; returns their number."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in _EVENTS and str(arguments[0]).startswith(str(package)):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()
        os.write(writer, str(count).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as counted:
        text = counted.read()
    _, status = os.waitpid(child, 0)
    if kill_at is None:
        assert status == 0, f"the writer ended with status {status}"
        return int(text)
    if status == 0:  # an earlier export was killed after it had compiled, so this one had less to do
        return 0
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the writer ended with status {status}"
    return kill_at


def killed(package: Path, works: Sequence[Callable[[], object]], kills: int) -> Counter[str]:
    """How often the version of before and how often the new one was served after a kill.

    works: two, of which the first is served last; whichever is not served is done.
    """
    counts: Counter[str] = Counter({"before": 0, "new": 0})
    total = min(operations(package, work, None) for work in reversed(works))
    turn = 1
    for kill_at in np.linspace(1, total, kills).astype(int).tolist():
        before = Version.open(package).name
        killed_at = operations(package, works[turn % 2], kill_at)
        after = Version.open(package).name  # raises where it is not whole
        counts[("before" if after == before else "new") if killed_at else "finished"] += 1
        turn += after != before
        with writing(package):  # as the next writer begins: what this one left half done goes
            pass
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN")
    parser.add_argument("--package", type=Path, help="A package of one of them, which is copied; unset: export it.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--export", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        if arguments.package:
            shutil.copytree(arguments.package, package)
        else:
            export(arguments.runs[0], package, load_export_config(["tables.dtype=int8", "gate.rows=0"]))
        works = [partial(publish, run, package) for run in arguments.runs]
        print(f"publish: {arguments.kills} kills, whole each time: {dict(killed(package, works, arguments.kills))}")
        if arguments.export:
            configs = [
                load_export_config([f"tables.dtype={kind}", "gate.rows=0", "keep=0"]) for kind in ("fp16", "int4")
            ]
            works = [partial(export, arguments.runs[0], package, config) for config in configs]
            print(
                f"export: {arguments.export} kills, whole each time: {dict(killed(package, works, arguments.export))}"
            )


if __name__ == "__main__":
    main()

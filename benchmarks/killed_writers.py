"""Kills `gr publish` and `gr export` with SIGKILL, each time at another file operation, and opens the package.

    python -m benchmarks.killed_writers RUN OTHER_RUN [--kills 100] [--export 100]

RUN and OTHER_RUN are two runs of one form. Whichever is not served is published, and killed before one of the file
operations that it does in the package, from the first to the last. After each kill the package is opened as a server
opens it, with all SHA-256 and golden rows: what it serves must be whole, and be the version of before or the new one.

--export: so many kills of an export of another form, each into the same package as before. The compiler runs once, and
what it has made is written again by each export, in pieces, so that kills come in the middle of it too. After every
tenth kill the export is done again over what the killed one left, and must be served.
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

import gr.serving.export as exporting
from gr.config.export import load_export_config
from gr.serving.export import export, publish
from gr.serving.package.layout import CODE
from gr.serving.package.version import Version
from gr.serving.package.writer import writing

PIECES = 16  # in which what the compiler has made is written
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
    if status == 0:  # a writer that was killed late left less to do
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


def killed_exports(package: Path, run: str, kills: int) -> Counter[str]:
    """As `killed`, for exports of int4 tables into a package that serves others."""
    config = load_export_config(["tables.dtype=int4", "gate.rows=0"])
    compiled = package.with_name("compiled")
    exported = export(run, Path(shutil.copytree(package, compiled)), config).stored
    code = compiled / CODE / exported.code

    def write_pass(_: object, path: Path) -> None:
        content = (code / path.name).read_bytes()
        size = -(-len(content) // PIECES)
        for start in range(0, len(content), size):
            with path.open("ab") as file:
                file.write(content[start : start + size])

    exporting._compile = write_pass
    before, pristine = Version.open(package).name, package.with_name("pristine")
    package.rename(pristine)
    counts: Counter[str] = Counter({"before": 0, "new": 0})
    total = operations(Path(shutil.copytree(pristine, package)), partial(export, run, package, config), None)
    for number, kill_at in enumerate(np.linspace(1, total, kills).astype(int).tolist()):
        shutil.rmtree(package)
        shutil.copytree(pristine, package)
        assert operations(package, partial(export, run, package, config), kill_at), "it ended before it was killed"
        after = Version.open(package).name
        assert after in (before, exported.weights), after
        counts["before" if after == before else "new"] += 1
        if number % 10 == 0:
            export(run, package, config)
            assert Version.open(package).name == exported.weights
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
        if arguments.kills:
            print(f"publish: {arguments.kills} kills, whole each time: {dict(killed(package, works, arguments.kills))}")
        if arguments.export:
            counts = killed_exports(package, arguments.runs[0], arguments.export)
            print(f"export: {arguments.export} kills, whole each time: {dict(counts)}")


if __name__ == "__main__":
    main()

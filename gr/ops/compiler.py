"""Compiles C++ of gr with the user's g++, once for each machine, without torch.

Libraries lie in the user's cache directory. A library's name has a hash of its sources, the flags, the compiler and the
CPU, so a change of any of them builds a new one, and several versions live side by side.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gr.errors import InstallError
from gr.logging import get_logger

_logger = get_logger(__name__)
_COMPILERS = ("g++", "clang++")
_WRITABLE_BY_OTHERS = 0o022
# The operators take half a minute of a CPU; on a machine that many share that was more than five minutes of the clock.
_BUILD_TIMEOUT_S = 1800


def find_compiler() -> str:
    """Raises InstallError where there is none."""
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise InstallError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH. Install g++.")


def fingerprint(files: Sequence[Path], *settings: object) -> str:
    """A hash of the files, the compiler, the CPU and the settings; raises InstallError without a compiler."""
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((compiler, version, *settings)).encode() + _cpu_description().encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def library(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """<name>.so in the user's cache directory, built if there is none. flags: of the compiler, then of the linker.

    Raises InstallError where it cannot be built, or others can write it.
    """
    try:
        path = cache_directory() / f"{name}.so"
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                build(path, sources, flags)
        _require_own(path)
        if path.stat().st_mode & _WRITABLE_BY_OTHERS:
            raise InstallError(f"{path} can be written by other users, so it is not loaded. Remove it.")
    except OSError as error:
        raise InstallError(f"the C++ operators cannot be stored: {error}") from error
    return path


def cache_directory() -> Path:
    """The user's cache directory by the XDG convention, or a private temporary one if the home cannot be written."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "gr"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.gettempdir()) / f"gr-cache-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
    _require_own(directory)
    if directory.stat().st_mode & _WRITABLE_BY_OTHERS:
        directory.chmod(0o700)  # a library that others have put there meanwhile is theirs, and so refused
    return directory


def _require_own(path: Path) -> None:
    """Raises InstallError unless `path` is this user's, root's too: code of other users is not loaded."""
    if path.stat().st_uid != os.getuid():
        raise InstallError(f"{path} belongs to another user, so code in it is not loaded. Set XDG_CACHE_HOME.")


def _cpu_description() -> str:
    """The CPU features that -march=native depends on, since machines that differ may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    relevant = ("model name", "model\t", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(relevant)}))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock: one of several processes builds, the others wait. The lock ends with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(path: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """Compiles the library at `path`; raises InstallError with the compiler's message."""
    compiler = find_compiler()
    _logger.info("building the C++ operators of gr with %s, half a minute of a CPU, once for this machine", compiler)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        # One translation unit of all sources: reading torch's headers takes 5 of the 7 seconds of a source by itself.
        unit, draft = Path(directory, "unit.cpp"), Path(directory, "draft.so")
        unit.write_text("".join(f'#include "{source}"\n' for source in sources))
        _run([compiler, str(unit), *flags, "-o", str(draft)])
        draft.chmod(0o755)  # whatever the umask
        draft.replace(path)
    _logger.info("built %s in %.0f seconds", path, time.perf_counter() - started)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_BUILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"building the C++ operators took more than {_BUILD_TIMEOUT_S} seconds") from error
    if done.returncode:
        raise InstallError(f"building the C++ operators failed: {' '.join(command)}\n{done.stdout[-2000:]}")

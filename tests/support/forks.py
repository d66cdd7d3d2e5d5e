"""Python programs in processes forked from one that has loaded torch and gr: each costs what it does, not 4 s more.

    client ── arguments, environment, streams ──> keeper ── forks ──> program
           <── pid, and at the end how it ended ──

`python()` starts the server, which forks keepers, and writes the client, which takes the place of Python in a command
(`-m MODULE`, `-c CODE` or a script, and arguments); torchrun starts its ranks with it where PYTHON_EXEC names it. A
client passes signals on to its program and ends as that does; when a client is killed, so is its program, which is
no child of the client. `sys.executable` in a program is Python's own.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.support import ROOT

# What most commands load, and torchrun.
MODULES = ("torch.distributed.run", "torch.utils.tensorboard", "gr.experiment", "gr.cli.train", "gr.cli.evaluate")
MODULES += ("gr.recipes.retrieval", "gr.recipes.ranking", "gr.recipes.click", "gr.recipes.baselines")
Program = Callable[[], object]

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
keeper = socket.socket(socket.AF_UNIX)
keeper.connect({address!r})
socket.send_fds(keeper, [b"+"], [0, 1, 2])
keeper.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
program = int(keeper.recv(16))
for number in signal.Signals:
    if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler) and number not in (
        signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD
    ):
        signal.signal(number, lambda number, _: os.kill(program, number))
code = int(keeper.recv(16))
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


_seconds: list[Path] = []  # files with the CPU seconds of programs that have ended, one a line


def cpu_seconds() -> float:
    """Of all programs of this process's servers that have ended, with what they started."""
    total = 0.0
    for path in _seconds:
        with contextlib.suppress(FileNotFoundError), open(path) as lines:  # a test may have replaced Path's own way
            total += sum(map(float, lines))
    return total


@contextlib.contextmanager
def python() -> Iterator[Path]:
    """The path of the client."""
    with tempfile.TemporaryDirectory(prefix="gr-python-") as folder:
        client, address = Path(folder) / "python", f"{folder}/socket"
        client.write_text(_CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as server:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            _seconds.append(Path(address + "-seconds"))
            yield client
            server.communicate()  # it ends when its standard input does, and so whenever this process does
            _seconds.pop()


def serve(address: str) -> Program | None:
    """Returns the program of a request, in a process of its own, and None in this one at the end of standard input."""
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in readable:
                return None
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _keep(client, f"{address}-seconds")
            client.close()
            with contextlib.suppress(ChildProcessError):  # there is none
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue


def _keep(client: socket.socket, seconds: str) -> Program:
    """Returns the program, in a fork; this process answers the client and is gone when the program is."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile() as lines:
        arguments, folder, environment = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return _program(arguments)
    for number, stream in enumerate(streams):
        os.close(stream)
        os.close(number)  # a reader of the program's output waits for nobody else
    with contextlib.suppress(BrokenPipeError):
        client.sendall(str(pid).encode())
    end = os.pidfd_open(pid)
    if end not in select.select([client, end], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    with open(seconds, "a") as lines:
        lines.write(f"{used.ru_utime + used.ru_stime}\n")
    with contextlib.suppress(BrokenPipeError):
        client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _program(arguments: list[str]) -> Program:
    """What `python ARGUMENTS` does, with the modules that are loaded."""
    while arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    first, *rest = arguments
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    known = [entry for entry in sys.path[1:] if entry not in path]
    if first in ("-m", "-c"):
        name, *rest = rest
        sys.argv, sys.path[:] = [first, *rest], [os.getcwd() if first == "-m" else "", *path, *known]
        if first == "-m":
            return partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
        return partial(exec, compile(name, "<string>", "exec"), sys.modules["__main__"].__dict__)
    assert not first.startswith("-"), f"python {first} is not among what these programs may be started with"
    sys.argv, sys.path[:] = [first, *rest], [str(Path(first).resolve().parent), *path, *known]
    return partial(runpy.run_path, first, run_name="__main__")


if __name__ == "__main__" and (program := serve(sys.argv[1])) is not None:
    program()

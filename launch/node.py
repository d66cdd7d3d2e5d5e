"""One node's share of a job. Every launcher runs this on every node, and nothing else starts ranks.

    python -m launch.node --nnodes 2:4 --nproc 8 --rendezvous node0 --id 1234 train CONFIG [KEY.PATH=VALUE]...

It checks what only the node itself can see, prints the environment it sets, and runs `torchrun ... -m gr train`. What
became of the run is read from RUN_DIR/status.json, since torchrun exits with 1 after any signal, saved or not.

exit code   meaning
0           done
1           it crashed, or another node did: worth another try
2           trying again will not cure it: `error: ...` says what and the remedy
75          stopped by a signal, saved; the same command resumes (EX_TEMPFAIL)
"""

import glob
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import click

from launch.status import CRASHED, DONE, FAILED, STOPPED, StatusFile

# How long the first node may take to come up after the others: image pulls, slow file systems.
RENDEZVOUS_SECONDS = 300
# A membership that is at least the minimum is taken as complete after so long without a newcomer.
LAST_CALL_SECONDS = 15
PORTS = range(20000, 30000)  # below the ports that Linux hands out by itself (32768 and up)
POLL_SECONDS = 0.5


class NodeError(click.ClickException):
    """Shown as one line that begins with the node's name. Code 1 where another try may help."""

    def __init__(self, message: str, outcome: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = outcome  # type: ignore[misc]  # click declares it of the class

    def show(self, file: object = None) -> None:
        click.echo(f"error: {socket.gethostname()}: {self.format_message()}", err=True)


@dataclass(frozen=True)
class Group:
    """The nodes of a job. rendezvous: host:port of the first node, None for a job of one node."""

    least: int
    most: int
    rendezvous: str | None
    job_id: str

    @property
    def elastic(self) -> bool:
        return self.least != self.most


def parse_group(nnodes: str, rendezvous: str, job_id: str) -> Group:
    """nnodes: N or MIN:MAX. rendezvous: HOST, HOST:PORT, or env:NAME for the host in a variable."""
    least, _, most = nnodes.partition(":")
    if not (least.isdigit() and (most or least).isdigit() and 1 <= int(least) <= int(most or least)):
        raise NodeError(f"--nnodes={nnodes}: give N, or MIN:MAX with 1 <= MIN <= MAX")
    if int(most or least) == 1:
        return Group(1, 1, None, job_id)
    host = os.environ.get(rendezvous.removeprefix("env:"), "") if rendezvous.startswith("env:") else rendezvous
    if not host:
        raise NodeError(f"--rendezvous={rendezvous} names no host: give the first node's, as HOST or HOST:PORT")
    if ":" not in host:
        # The same on every node of a job, and another for another job on the same nodes.
        host = f"{host}:{PORTS[zlib.crc32(job_id.encode()) % len(PORTS)]}"
    return Group(int(least), int(most or least), host, job_id)


def resolved(config: str, overrides: tuple[str, ...]) -> dict:
    """The configuration as gr reads it here. gr has printed the fault where it cannot."""
    import yaml

    if not Path(config).is_file():
        raise NodeError(
            f"{config} is not here, in {Path.cwd()}: submit from a folder that every node mounts (or ship it: "
            "torchx -cfg job_dir=..., an image), and name the configuration relative to it"
        )
    command = [sys.executable, "-m", "gr", "config", "show", config, *overrides]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if shown.returncode:
        sys.exit(FAILED)
    return yaml.safe_load(shown.stdout)


def processes(wanted: str, device: str) -> int:
    """Ranks to start here: one a GPU, or one on a CPU node, where `wanted` is auto."""
    cpus, gpus = len(os.sched_getaffinity(0)), 0 if device == "cpu" else _gpus()
    if wanted == "auto":
        return gpus or 1
    limit, what = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    if not wanted.isdigit() or not 1 <= int(wanted):
        raise NodeError(f"--nproc={wanted}: give a number of ranks for this node, or auto for one a GPU")
    if int(wanted) > limit:
        raise NodeError(
            f"--nproc={wanted} ranks, but this node offers {limit} {what}: use --nproc={limit} and more nodes, or a "
            "larger --resource"
        )
    return int(wanted)


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def environment(group: Group, nproc: int) -> dict[str, str]:
    """What the ranks get beyond the user's own environment, which wins. The one place for it."""
    ours = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc))}
    if group.elastic:
        # torch 2.13: with a shared store a node that comes back waits for an address nobody publishes, and all die.
        ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return {name: os.environ.get(name, value) for name, value in ours.items()}


def torchrun(group: Group, nproc: int, restarts: int, grace: int, log_dir: Path | None) -> list[str]:
    """The agent's command, up to the arguments of a rank's Python. grace: seconds ranks have to save."""
    options = {
        "nnodes": str(group.least) if group.least == group.most else f"{group.least}:{group.most}",
        "nproc-per-node": str(nproc),
        "max-restarts": str(restarts),
        "rdzv-backend": "c10d",
        "rdzv-endpoint": group.rendezvous or "localhost:0",
        "rdzv-id": group.job_id,
        "rdzv-conf": f"join_timeout={RENDEZVOUS_SECONDS},last_call_timeout={LAST_CALL_SECONDS}",
        "shutdown-timeout": str(grace),
        "signals-to-handle": "SIGUSR1",
    }
    if log_dir is not None:
        options |= {"log-dir": str(log_dir), "tee": "3"}
    agent = [sys.executable, "-m", "launch.agent", *(f"--{name}={value}" for name, value in options.items())]
    # Slurm signals every process of a step. A second signal would end the agent while its ranks save, so it is deaf to
    # TERM, hears this node's USR1 alone, and passes that on; ranks know both.
    return ["env", "--ignore-signal=TERM", *agent, "--no-python", "env", "--default-signal=TERM", sys.executable]


def await_rendezvous(endpoint: str, seconds: float = RENDEZVOUS_SECONDS) -> None:
    """Returns when the first node listens, at once if this is it. Raises NodeError after `seconds`."""
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            address = socket.gethostbyname(host)
            if _is_here(address):
                return
            with socket.create_connection((address, int(port)), timeout=5):
                return
        except OSError as error:
            fault = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise NodeError(
                f"rendezvous {endpoint} does not answer ({fault}) after {seconds:.0f} s: is that node running, does "
                "its name resolve here, and do the nodes let each other through on that port?",
                outcome=CRASHED,
            )
        time.sleep(1)


def _is_here(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


class Agent:
    """torchrun as a child: signals are passed on to it alone, and a run that failed for good is not restarted.

    It gets a session of its own, so that Ctrl-C in a terminal reaches each rank once, through torchrun, and not twice.
    """

    def __init__(self, command: list[str], environment: dict[str, str], status: StatusFile | None) -> None:
        self._status = status
        self._signals: list[int] = []
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        self._child = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
        self.code = self._wait()
        for number, action in before.items():
            signal.signal(number, action)

    @property
    def stopped(self) -> bool:
        """Whether this node was asked to stop."""
        return bool(self._signals)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _wait(self) -> int:
        told = False
        while True:
            try:
                return self._child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                for_good = self._status is not None and self._status.outcome() == FAILED
                if not told and (self.stopped or for_good):
                    told = True
                    self._child.send_signal(signal.SIGUSR1)
                if self._signals.count(signal.SIGINT) > 1:  # a second Ctrl-C: leave at once
                    os.killpg(self._child.pid, signal.SIGKILL)


def check_nodes(group: Group, ranks: int, environment: dict[str, str], arguments: Sequence[str]) -> None:
    """`gr doctor --cluster` on every rank of the job, before any of them trains. Raises NodeError."""
    host, _, port = str(group.rendezvous).rpartition(":")
    # A port of its own: the store of one may still be leaving when that of the other comes.
    endpoint = f"{host}:{int(port) + 1}"
    await_rendezvous(endpoint)
    apart = replace(group, job_id=f"{group.job_id}-preflight", rendezvous=endpoint)
    agent = torchrun(apart, ranks, restarts=0, grace=LAST_CALL_SECONDS, log_dir=None)
    check = Agent([*agent, "-m", "gr", "doctor", "--cluster", *arguments], environment, None)
    if check.stopped:
        sys.exit(CRASHED)
    if check.code:
        # Worth another try: a scheduler may give other nodes, and one that was signalled fails the check of all.
        raise NodeError(
            "these nodes are not fit to train together; FAULT above says why (--no-preflight skips this)", CRASHED
        )


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nnodes", default="1", show_default=True, help="N, or MIN:MAX for an elastic job.")
@click.option("--nproc", default="auto", show_default=True, help="Ranks on this node; auto: one a GPU, or 1.")
@click.option("--rendezvous", default="", help="First node: HOST, HOST:PORT or env:NAME. Not needed on one node.")
@click.option("--id", "job_id", default="gr", show_default=True, help="The same on every node; another for each job.")
@click.option("--restarts", default=3, show_default=True, help="Restarts of the ranks by torchrun after a crash.")
@click.option("--grace", default=240, show_default=True, help="Seconds ranks have to save once asked to stop.")
@click.option("--preflight/--no-preflight", default=True, show_default=True, help="Check a job's nodes first.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="{train|evaluate} ARGUMENTS...")
def command(
    nnodes: str, nproc: str, rendezvous: str, job_id: str, restarts: int, grace: int, preflight: bool, arguments
) -> None:
    group = parse_group(nnodes, rendezvous, job_id)
    verb, *rest = arguments
    if verb not in ("train", "evaluate") or (verb == "train" and not rest):
        raise NodeError(
            f"what to run is {' '.join(arguments)!r}: give `train CONFIG ...` or `evaluate --checkpoint ...`"
        )
    settings = resolved(rest[0], tuple(rest[1:])) if verb == "train" else {}
    run_dir = Path(settings["run_dir"]) if settings else None
    ranks = processes(nproc, settings.get("device", "auto"))
    ours = environment(group, ranks)
    said = f"nodes={nnodes} ranks_here={ranks} rendezvous={group.rendezvous or 'local'} id={job_id} run_dir={run_dir}"
    click.echo(f"node {socket.gethostname()}: {said} " + " ".join(f"{k}={v}" for k, v in ours.items()), err=True)
    if group.rendezvous is not None:
        if preflight and settings and not group.elastic:
            check_nodes(group, ranks, ours, rest)
        await_rendezvous(group.rendezvous)
    status = StatusFile(run_dir / "status.json") if run_dir else None
    agent = torchrun(group, ranks, restarts, grace, run_dir / "logs" if run_dir else None)
    code = Agent([*agent, "-m", "gr", *arguments], ours, status).code
    outcome = status.outcome(settle=code == 0) if status else (DONE if code == 0 else CRASHED)
    if outcome in (FAILED, STOPPED):
        click.echo(f"node {socket.gethostname()}: {status.sentence() if status else ''}", err=True)
    sys.exit(outcome)


if __name__ == "__main__":
    command()

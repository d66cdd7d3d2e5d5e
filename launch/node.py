"""One node's share of a job. Every launcher runs this on every node, and nothing else starts ranks.

    python -m launch.node --nnodes 2:4 --nproc 8 --rendezvous node0 --id 1234 train CONFIG [KEY.PATH=VALUE]...

It checks what only the node itself can see, prints the environment it sets, and runs `torchrun ... -m gr train`. The
outcome of the run is read from RUN_DIR/status.json, since torchrun exits with 1 after any signal, saved or not.

exit code   meaning
0           done
1           it crashed, or another node did: worth another try
2           trying again will not cure it: `error: ...` says what and the remedy
75          stopped by a signal; the same command resumes (EX_TEMPFAIL)
"""

import glob
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from launch.outcome import CRASHED, DONE, FAILED, STOPPED, Attempt, NodeError, printable
from launch.rendezvous import Group, await_rendezvous, parse_group
from launch.stop import Stop

# The seconds without a newcomer after which a membership of the minimum or more counts as complete.
LAST_CALL_SECONDS = 15
POLL_SECONDS = 0.5
STATUS_SECONDS = 10.0  # the interval between two reads of status.json, which all nodes share
NOT_NEGATIVE = click.IntRange(min=0)
JOB_ID = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)
SHOWN = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_")


@dataclass(frozen=True)
class Options:
    """The options of the command line; `--help` explains them."""

    nnodes: str
    nproc: str
    rendezvous: str
    job_id: str
    attempt: int
    restarts: int
    crashes: int
    grace: int
    join_timeout: int
    preflight: bool


def resolved(config: str, overrides: tuple[str, ...]) -> dict:
    """The configuration as gr resolves it on this node. Exits with FAILED after gr has printed a fault."""
    import yaml

    # A name without an ending may be that of a configuration that is installed with gr, which gr looks up.
    if Path(config).suffix in (".yaml", ".yml") and not Path(config).is_file():
        raise NodeError(
            f"{config} is not here, in {Path.cwd()}: submit from a folder that every node mounts (or ship it: "
            "torchx -cfg job_dir=..., an image), and name the configuration relative to it"
        )
    option = next((word for word in overrides if word.startswith("-")), None)
    if option:
        raise NodeError(f"{option}: what follows the configuration are values, KEY.PATH=VALUE (planner.plan=plan.json)")
    command = [sys.executable, "-m", "gr", "config", "show", config, *overrides]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if output.returncode:
        sys.exit(FAILED)
    return yaml.safe_load(output.stdout)


def processes(nproc: str, gpus: int) -> int:
    """The number of ranks to start on this node; auto means one a GPU, or one on a CPU node."""
    if nproc == "auto":
        return gpus or 1
    limit, unit = (gpus, "GPUs") if gpus else (cpus(), "CPUs")
    if not (nproc.isascii() and nproc.isdigit() and int(nproc)):
        raise NodeError(f"--nproc={nproc}: give a number of ranks for this node, or auto for one a GPU")
    if int(nproc) > limit:
        raise NodeError(
            f"--nproc={nproc} ranks, but this node offers {limit} {unit}: use --nproc={limit} and more nodes, or a "
            "larger --resource"
        )
    return int(nproc)


def visible_gpus() -> int:
    """The number of GPUs on this node, counted without torch, which may be unable to use them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def cpus(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The number of CPUs this process may use: its affinity, or a smaller quota of its container (cgroup v2)."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = limit.read_text().split() if limit.exists() else ("max", "")
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))


def environment(nproc: int) -> dict[str, str]:
    """The only variables that launch.node adds to the environment of the ranks; the user's own values win."""
    defaults = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, cpus() // nproc)),
        # torch 2.13: ranks that torchrun starts again would find the addresses of dead ones in a store that it shares
        # with them, and a node that comes back would wait for an address that nobody publishes.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def node_logs(run_dir: Path) -> Path:
    """Makes the log folder of this node's ranks under run_dir. Raises NodeError if it cannot be made."""
    folder = run_dir / "logs" / socket.gethostname()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        permanent = isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
        raise NodeError(
            f"run_dir={run_dir} cannot be written: {error.strerror}; mend its owner or its mount, or set another one",
            outcome=FAILED if permanent else CRASHED,
        ) from None
    return folder


@dataclass(frozen=True)
class Node:
    """One node of the group, with its number of ranks."""

    options: Options
    group: Group
    ranks: int
    stop: Stop

    def train(self, arguments: Sequence[str], run_dir: Path) -> int:
        """Runs an attempt; the outcome comes from run_dir or, if that holds none, from the exit code of the agent."""
        logs, attempt = node_logs(run_dir), Attempt(run_dir)
        code = self._start(["train", *arguments], attempt, logs)
        outcome = attempt.outcome(settle=code != FAILED and not self.stop.asked)
        if outcome == STOPPED and code != DONE and not self.stop.asked:
            outcome = CRASHED  # a rank crashed, and torchrun stopped the others
        if outcome in (FAILED, STOPPED):
            self._say(attempt.sentence())
        if outcome != CRASHED:
            return outcome
        if self.stop.asked:
            self._say("stopped before it could save; the same command resumes from the last checkpoint, if any")
            return STOPPED
        if code == CRASHED and self.group.first_is_here():
            crashes = attempt.crashes(self.options.job_id)
            if crashes >= self.options.crashes:
                raise NodeError(
                    f"crashed {crashes} times in a row without a new checkpoint, so it is not tried again; what the "
                    f"ranks said is in {run_dir / 'logs'}"
                )
        return code

    def evaluate(self, arguments: Sequence[str]) -> int:
        code = self._start(["evaluate", *arguments], None, None)
        return STOPPED if self.stop.asked and code == CRASHED else code

    def _start(self, arguments: Sequence[str], attempt: Attempt | None, logs: Path | None) -> int:
        """Checks the nodes and runs the agent. Returns DONE, FAILED or CRASHED by its exit code."""
        self._say(self._described())
        try:
            if self.options.preflight and attempt is not None and (self.ranks > 1 or self.group.max_nodes > 1):
                self._check_nodes(arguments[1:])
            if self.group.rendezvous is not None:
                await_rendezvous(self.group.rendezvous, self.options.join_timeout, self.stop)
        except NodeError as error:
            error.show()
            return error.exit_code
        if self.stop.asked:
            return CRASHED
        code = self._run_agent([*self._torchrun(self.group, logs), "gr", *arguments], attempt)
        return code if code in (DONE, FAILED) else CRASHED

    def _check_nodes(self, arguments: Sequence[str]) -> None:
        """Runs `gr doctor --cluster` on every rank of the job, before any of them trains. Raises NodeError.

        A node of an elastic job checks itself alone, since the others may be training.
        """
        name = f"{self.group.job_id}-preflight"
        # The check has a port of its own: its store may still be closing when the store of the training starts.
        check = Group(1, 1, None, name) if self.group.elastic else self.group.next_port(name)
        if check.rendezvous:
            await_rendezvous(check.rendezvous, self.options.join_timeout, self.stop)
        if self.stop.asked:
            return
        code = self._run_agent([*self._torchrun(check, None), "gr", "doctor", "--cluster", *arguments], None)
        if code and not self.stop.asked:
            # Another try may help: a scheduler may give other nodes, and a signalled node fails the check of all.
            raise NodeError(
                "these nodes are not fit to train together; FAULT above says why (--no-preflight skips this)", CRASHED
            )

    def _torchrun(self, group: Group, logs: Path | None) -> list[str]:
        """The command of the agent, up to the module that ranks run."""
        endpoint, own_address = group.meeting_place()
        options = {
            "nnodes": f"{group.min_nodes}:{group.max_nodes}" if group.elastic else str(group.min_nodes),
            "nproc-per-node": str(self.ranks),
            "max-restarts": str(self.options.restarts if logs is not None else 0),
            "rdzv-backend": "c10d",
            "rdzv-endpoint": endpoint,
            "rdzv-id": group.job_id,
            "rdzv-conf": f"join_timeout={self.options.join_timeout},last_call_timeout={LAST_CALL_SECONDS}",
            "shutdown-timeout": str(self.options.grace if logs is not None else LAST_CALL_SECONDS),
            "signals-to-handle": "SIGUSR1",
        }
        if own_address is not None:
            options["local-addr"] = own_address
        if logs is not None:
            options |= {"log-dir": str(logs), "tee": "3"}
        return [sys.executable, "-m", "launch.agent", *(f"--{name}={value}" for name, value in options.items()), "-m"]

    def _run_agent(self, command: Sequence[str], attempt: Attempt | None) -> int:
        """Runs torchrun and returns its exit code.

        It gets one signal, on a request to stop this node or when the run has failed permanently; without that signal
        it would start the ranks again. It has a session of its own, so that Ctrl-C in a terminal reaches each rank
        once, through torchrun, and not twice.
        """
        variables = {**os.environ, **environment(self.ranks)}
        child = subprocess.Popen(command, env=variables, start_new_session=True, preexec_fn=_ignore_termination)
        signalled, next_read = False, time.monotonic() + STATUS_SECONDS
        while True:
            try:
                return child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if self.stop.at_once:
                    os.killpg(child.pid, signal.SIGKILL)
                failed = False
                if attempt is not None and not self.stop.asked and time.monotonic() > next_read:
                    failed, next_read = attempt.outcome() == FAILED, time.monotonic() + STATUS_SECONDS
                if not signalled and (self.stop.asked or failed):
                    signalled = True
                    child.send_signal(signal.SIGUSR1)

    def _described(self) -> str:
        place, added = self.group.rendezvous or "local", environment(self.ranks)
        facts = {"nodes": self.options.nnodes, "ranks_here": self.ranks, "rendezvous": place, "id": self.group.job_id}
        present = {name: value for name, value in sorted(os.environ.items()) if name.startswith(SHOWN)}
        return " ".join(f"{name}={value}" for name, value in (facts | present | added).items())

    def _say(self, text: str) -> None:
        click.echo(printable(f"node {socket.gethostname()}: {text}"), err=True)


def _ignore_termination() -> None:
    """Ignores TERM until launch.agent has installed its own handler."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run(options: Options, arguments: tuple[str, ...], stop: Stop) -> int:
    """Runs this node's part of the job and returns its exit code."""
    verb, *rest = arguments
    if verb.startswith("-"):
        raise NodeError(f"no such option: {verb} (--help lists them)")
    if verb not in ("train", "evaluate") or (verb == "train" and not rest):
        raise NodeError(
            f"what to run is {' '.join(arguments)!r}: give `train CONFIG ...` or `evaluate --checkpoint ...`"
        )
    if not JOB_ID.fullmatch(options.job_id):  # a folder and a file of torchrun's have the name
        raise NodeError(f"--id={options.job_id}: give at most 200 of a-z, A-Z, 0-9, -, _ and ., beginning with no dot")
    group = parse_group(options.nnodes, options.rendezvous, f"{options.job_id}-{options.attempt}")
    settings = resolved(rest[0], tuple(rest[1:])) if verb == "train" else {}
    device = settings.get("device", "auto")
    gpus = visible_gpus() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise NodeError(
            "device=cuda, but no GPU is visible here: ask the scheduler for some (sbatch --gpus-per-node, --resource), "
            "look at CUDA_VISIBLE_DEVICES, or set device=cpu"
        )
    ranks = processes(options.nproc, gpus)
    if gpus and device == "auto" and not any(word.startswith("device=") for word in rest):
        rest.append("device=cuda")  # else ranks that find no GPU would train on CPU
    node = Node(options, group, ranks, stop)
    return node.evaluate(rest) if verb == "evaluate" else node.train(rest, Path(settings["run_dir"]))


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nnodes", default="1", show_default=True, help="N, or MIN:MAX for an elastic job.")
@click.option("--nproc", default="auto", show_default=True, help="Ranks on this node; auto: one a GPU, or 1.")
@click.option("--rendezvous", default="", help="First node: HOST, HOST:PORT or env:NAME. Not needed on one node.")
@click.option("--id", "job_id", default="gr", show_default=True, help="The same on every node; another for each job.")
@click.option("--attempt", default=0, show_default=True, help="Which of the job's attempts this is.")
@click.option("--restarts", type=NOT_NEGATIVE, default=3, show_default=True, help="Restarts of crashed ranks.")
@click.option(
    "--crashes",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Attempts in a row that may crash without a new checkpoint; the last of them has failed for good.",
)
@click.option("--grace", type=NOT_NEGATIVE, default=240, show_default=True, help="Seconds ranks have to stop and save.")
@click.option(
    "--join-timeout",
    type=NOT_NEGATIVE,
    default=300,
    show_default=True,
    help="Seconds to wait for the other nodes: image pulls, slow file systems.",
)
@click.option("--preflight/--no-preflight", default=True, show_default=True, help="Check a job's nodes first.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="{train|evaluate} ARGUMENTS...")
def command(arguments: tuple[str, ...], **options) -> None:
    with Stop() as stop:
        sys.exit(run(Options(**options), arguments, stop))


if __name__ == "__main__":
    command()

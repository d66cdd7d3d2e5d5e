"""One node's share of a job. Every launcher runs this on every node, and nothing else starts ranks.

    python -m launch.node --nnodes 2:4 --nproc 8 --rendezvous node0 --id 1234 train CONFIG [KEY.PATH=VALUE]...

It checks what only the node itself can see, prints the environment it sets, and runs `torchrun ... -m gr train`. What
became of the run is read from RUN_DIR/status.json, since torchrun exits with 1 after any signal, saved or not.

exit code   meaning
0           done
1           it crashed, or another node did: worth another try
2           trying again will not cure it: `error: ...` says what and the remedy
75          stopped by a signal; the same command resumes (EX_TEMPFAIL)
"""

import glob
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from launch.outcome import CRASHED, DONE, FAILED, STOPPED, Attempt, NodeError
from launch.rendezvous import Group, await_rendezvous, parse_group
from launch.stop import Stop

# A membership that is at least the minimum is taken as complete after so long without a newcomer.
LAST_CALL_SECONDS = 15
POLL_SECONDS = 0.5
STATUS_SECONDS = 10.0  # between two looks at status.json, which all nodes share
NOT_NEGATIVE = click.IntRange(min=0)
SHOWN = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_")


@dataclass(frozen=True)
class Options:
    """Those of the command line, which says what they mean."""

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
    """The configuration as gr reads it here. gr has printed the fault where it cannot."""
    import yaml

    if not Path(config).is_file():
        raise NodeError(
            f"{config} is not here, in {Path.cwd()}: submit from a folder that every node mounts (or ship it: "
            "torchx -cfg job_dir=..., an image), and name the configuration relative to it"
        )
    wrong = next((word for word in overrides if word.startswith("-")), None)
    if wrong:
        raise NodeError(f"{wrong}: what follows the configuration are values, KEY.PATH=VALUE (planner.plan=plan.json)")
    command = [sys.executable, "-m", "gr", "config", "show", config, *overrides]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if shown.returncode:
        sys.exit(FAILED)
    return yaml.safe_load(shown.stdout)


def processes(wanted: str, gpus: int) -> int:
    """Ranks to start here: one a GPU, or one on a CPU node, where `wanted` is auto."""
    if wanted == "auto":
        return gpus or 1
    limit, what = (gpus, "GPUs") if gpus else (cpus(), "CPUs")
    if not (wanted.isascii() and wanted.isdigit() and int(wanted)):
        raise NodeError(f"--nproc={wanted}: give a number of ranks for this node, or auto for one a GPU")
    if int(wanted) > limit:
        raise NodeError(
            f"--nproc={wanted} ranks, but this node offers {limit} {what}: use --nproc={limit} and more nodes, or a "
            "larger --resource"
        )
    return int(wanted)


def visible_gpus() -> int:
    """GPUs here, counted without torch, which need not be able to use them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def cpus(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs this process may use: its affinity, or a container's quota (cgroup v2) where that is less."""
    own = len(os.sched_getaffinity(0))
    quota, period = limit.read_text().split() if limit.exists() else ("max", "")
    return own if quota == "max" else max(1, min(own, math.ceil(int(quota) / int(period))))


def environment(nproc: int) -> dict[str, str]:
    """What the ranks get beyond the user's own environment, which wins. The one place for it."""
    ours = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, cpus() // nproc)),
        # torch 2.13: ranks that torchrun starts again would find the addresses of dead ones in a store that it shares
        # with them, and a node that comes back would wait for an address that nobody publishes.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return {name: os.environ.get(name, value) for name, value in ours.items()}


def node_logs(run_dir: Path) -> Path:
    """The folder of this node's ranks under run_dir, which is made. Raises NodeError where it cannot be."""
    folder = run_dir / "logs" / socket.gethostname()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for_good = isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
        raise NodeError(
            f"run_dir={run_dir} cannot be written: {error.strerror}; mend its owner or its mount, or set another one",
            outcome=FAILED if for_good else CRASHED,
        ) from None
    return folder


@dataclass(frozen=True)
class Node:
    """This node's share: so many ranks of the group."""

    options: Options
    group: Group
    ranks: int
    stop: Stop

    def train(self, arguments: Sequence[str], run_dir: Path) -> int:
        """The outcome of an attempt of a run, from what it wrote into run_dir and, where that is silent, its code."""
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
        """Checks the nodes and runs the agent. Returns DONE, FAILED or CRASHED, as far as its exit code tells."""
        self._say(self._described())
        try:
            if self.options.preflight and attempt is not None and (self.ranks > 1 or self.group.most > 1):
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
        """`gr doctor --cluster` on every rank of the job, before any of them trains. Raises NodeError.

        A node of an elastic job looks at itself alone: the others may be training.
        """
        name = f"{self.group.job_id}-preflight"
        # A port of its own: the store of one may still be leaving when that of the other comes.
        apart = Group(1, 1, None, name) if self.group.elastic else self.group.next_port(name)
        if apart.rendezvous:
            await_rendezvous(apart.rendezvous, self.options.join_timeout, self.stop)
        if self.stop.asked:
            return
        code = self._run_agent([*self._torchrun(apart, None), "gr", "doctor", "--cluster", *arguments], None)
        if code and not self.stop.asked:
            # Worth another try: a scheduler may give other nodes, and one that was signalled fails the check of all.
            raise NodeError(
                "these nodes are not fit to train together; FAULT above says why (--no-preflight skips this)", CRASHED
            )

    def _torchrun(self, group: Group, logs: Path | None) -> list[str]:
        """The agent's command, up to the module that ranks run."""
        endpoint, own_address = group.meeting_place()
        words = {
            "nnodes": f"{group.least}:{group.most}" if group.elastic else str(group.least),
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
            words["local-addr"] = own_address
        if logs is not None:
            words |= {"log-dir": str(logs), "tee": "3"}
        return [sys.executable, "-m", "launch.agent", *(f"--{name}={value}" for name, value in words.items()), "-m"]

    def _run_agent(self, command: Sequence[str], attempt: Attempt | None) -> int:
        """The exit code of torchrun, which is told, once, when this node is asked to stop and when the run failed for
        good (else it would start the ranks again).

        It gets a session of its own, so that Ctrl-C in a terminal reaches each rank once, through torchrun, not twice.
        """
        ours = {**os.environ, **environment(self.ranks)}
        child = subprocess.Popen(command, env=ours, start_new_session=True, preexec_fn=_deaf_to_termination)
        told, look = False, time.monotonic() + STATUS_SECONDS
        while True:
            try:
                return child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if self.stop.at_once:
                    os.killpg(child.pid, signal.SIGKILL)
                for_good = False
                if attempt is not None and not self.stop.asked and time.monotonic() > look:
                    for_good, look = attempt.outcome() == FAILED, time.monotonic() + STATUS_SECONDS
                if not told and (self.stop.asked or for_good):
                    told = True
                    child.send_signal(signal.SIGUSR1)

    def _described(self) -> str:
        place, ours = self.group.rendezvous or "local", environment(self.ranks)
        said = {"nodes": self.options.nnodes, "ranks_here": self.ranks, "rendezvous": place, "id": self.group.job_id}
        theirs = {name: value for name, value in sorted(os.environ.items()) if name.startswith(SHOWN)}
        return " ".join(f"{name}={value}" for name, value in (said | theirs | ours).items())

    def _say(self, text: str) -> None:
        click.echo(f"node {socket.gethostname()}: {text}", err=True)


def _deaf_to_termination() -> None:
    """Until launch.agent has a handler of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run(options: Options, arguments: tuple[str, ...], stop: Stop) -> int:
    """The node's exit code."""
    verb, *rest = arguments
    if verb.startswith("-"):
        raise NodeError(f"no such option: {verb} (--help lists them)")
    if verb not in ("train", "evaluate") or (verb == "train" and not rest):
        raise NodeError(
            f"what to run is {' '.join(arguments)!r}: give `train CONFIG ...` or `evaluate --checkpoint ...`"
        )
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

"""Faults of a run: what happens, how many steps are lost, how soon it goes on, and whether its losses stay the same.

    python benchmarks/faults.py --folder /tmp/faults              # every row but the last, both configurations
    python benchmarks/faults.py --folder /tmp/faults --kills 100  # one job, killed 100 times at random

Ranks are forks of this process, which imported torch for them, that run `gr train`: a start takes a second, not ten.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import torchrec  # noqa: F401  imported for the ranks

import gr.experiment  # noqa: F401
from gr.checkpoint import CheckpointFolder
from gr.checkpoint.checksums import find_damage
from gr.checkpoint.store import SHARED
from gr.cli import main
from gr.status import read_status

RANKS = 2
PATIENCE = 1800.0
ROW_GROUP = {"synthetic": 16, "clicks": 500}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(RANKS), "WORLD_SIZE": str(RANKS)}


@dataclass(frozen=True)
class Job:
    """A configuration with what makes it short; every step is logged."""

    name: str
    config: str
    overrides: tuple[str, ...]
    steps: int
    every: int

    def arguments(self, run_dir: Path, *more: str) -> list[str]:
        saved = [f"checkpoint.every={self.every}", "checkpoint.keep_last=2", "trainer.log_every=1"]
        steps = [f"trainer.steps={self.steps}", f"run_dir={run_dir}"]
        return ["train", self.config, *self.overrides, *saved, *steps, *more]


@dataclass(frozen=True)
class Row:
    fault: str
    job: str
    happened: str
    lost: str
    seconds: str
    losses: str

    def __str__(self) -> str:
        return f"| {self.fault} | {self.job} | {self.happened} | {self.lost} | {self.seconds} | {self.losses} |"


class Ranks:
    """One attempt at a job: RANKS processes of `gr train`, in sessions of their own."""

    def __init__(self, job: Job, run_dir: Path, *more: str, prepare: Callable[[int], None] = lambda rank: None) -> None:
        self.run_dir, self.began = run_dir, time.time()
        self.logs = run_dir.parent / f"{run_dir.name}-logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        arguments = job.arguments(run_dir, *more)
        self.pids = [self._fork(rank, port, arguments, prepare) for rank in range(RANKS)]
        self.codes: dict[int, int] = {}

    def _fork(self, rank: int, port: str, arguments: list[str], prepare: Callable[[int], None]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            log = os.open(self.logs / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = port
            prepare(rank)
            code = main(arguments)
        finally:
            os._exit(code)

    def poll(self, rank: int) -> bool:
        """Whether a rank has left."""
        if rank not in self.codes:
            done, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return rank in self.codes

    def wait(self) -> list[int]:
        """Exit codes, as the shell has them: negative for a signal."""
        wait_for(lambda: all([self.poll(rank) for rank in range(RANKS)]), f"end of {self.run_dir}, see {self.logs}")
        return [self.codes[rank] for rank in range(RANKS)]

    def kill(self, number: signal.Signals, *ranks: int) -> None:
        for rank in set(ranks or range(RANKS)) - self.codes.keys():
            os.kill(self.pids[rank], number)

    def reached(self, step: int) -> float:
        """When this attempt, not an earlier one, logged `step`; 0 for not yet."""
        times = [line["time"] for line in records(self.run_dir) if line["step"] == step]
        return times[-1] if times and times[-1] > self.began else 0.0

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: last_step(self.run_dir) >= step, f"step {step} of {self.run_dir}")


def wait_for(condition: Callable[[], bool | float], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} in {PATIENCE:.0f} s")
        time.sleep(0.01)


def records(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in parsed if line["kind"] == "train"]


def last_step(run_dir: Path) -> int:
    return found[-1]["step"] if (found := records(run_dir)) else 0


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in records(run_dir)}


def joins(run_dir: Path, whole: dict[int, float]) -> str:
    """Whether the losses of all steps are those of the run that nobody disturbed."""
    found = losses(run_dir)
    if found == whole:
        return "bitwise equal"
    if found.keys() != whole.keys():
        return f"NOT EQUAL: {len(found)} of {len(whole)} steps"
    return f"equal to {max(abs(found[step] - whole[step]) for step in whole):.1e}"


def resumed(job: Job, run_dir: Path, before: int, whole: dict[int, float]) -> tuple[str, str, str]:
    """Starts the same command again, to the end: (steps lost, seconds to the first new step, losses)."""
    saved = CheckpointFolder(run_dir / "checkpoints").steps()
    again = Ranks(job, run_dir)
    codes = again.wait()
    if codes != [0, 0] or read_status(run_dir).state != "done":
        return "-", "-", f"NOT RESUMED: exit codes {codes}"
    first = (saved[-1] if saved else 0) + 1
    times = [line["time"] for line in records(run_dir) if line["step"] == first]
    seconds = f"{times[-1] - again.began:.1f}" if times else "-"
    return str(max(0, before - first + 1)), seconds, joins(run_dir, whole)


def said(run: Ranks) -> str:
    """The first rank's error line."""
    lines = [line for path in sorted(run.logs.glob("rank-*.txt")) for line in path.read_text().splitlines()]
    found = next((line for line in lines if line.startswith("error: ")), "")
    return found.removeprefix("error: ").replace(str(run.run_dir), "RUN").replace("|", "/")


def signalled(job: Job, run_dir: Path, whole: dict[int, float], number: signal.Signals, *ranks: int) -> Row:
    """The signal comes at one and a half checkpoints."""
    run = Ranks(job, run_dir)
    run.wait_for_step(job.every + job.every // 2)
    run.kill(number, *ranks)
    codes = run.wait()
    before = last_step(run_dir)
    state = read_status(run_dir).state
    row = (
        f"{number.name} to {f'rank {ranks[0]}' if ranks else 'all ranks'}",
        job.name,
        f"exit codes {codes}, status {state}",
    )
    return Row(*row, *resumed(job, run_dir, before, whole))


def full_disk(job: Job, run_dir: Path, whole: dict[int, float]) -> Row:
    """No file of rank 1 may grow past 4 KiB once training runs: it cannot write its part of the checkpoint."""

    def limit(rank: int) -> None:
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))

    first = Ranks(job, run_dir)
    first.wait_for_step(job.every + job.every // 2)
    first.kill(signal.SIGTERM)
    first.wait()
    codes = (run := Ranks(job, run_dir, prepare=limit)).wait()
    before, status = last_step(run_dir), read_status(run_dir)
    happened = f"exit codes {codes}, status {status.state}: {said(run)}"
    return Row("disk full on rank 1", job.name, happened, *resumed(job, run_dir, before, whole))


def hangs(job: Job, run_dir: Path, whole: dict[int, float]) -> Row:
    """Rank 1 is stopped (SIGSTOP) and stands still; rank 0 finds out by itself."""
    run = Ranks(job, run_dir, "trainer.timeouts.step=5")
    run.wait_for_step(job.every + job.every // 2)
    stopped = time.time()
    run.kill(signal.SIGSTOP, 1)
    wait_for(lambda: run.poll(0), "end of rank 0")
    found = time.time() - stopped
    run.kill(signal.SIGKILL, 1)  # as torchrun does once a rank has left
    codes = run.wait()
    before = last_step(run_dir)
    line = next(line for line in (run.logs / "rank-0.txt").read_text().splitlines() if line.startswith("error: rank 0"))
    where = line.partition(" is in ")[2].partition("; ")[0].partition(": ending it")[0]
    happened = f"rank 0 ends after {found:.0f} s, exit codes {codes}, having said: in {where}"
    return Row("rank 1 stands still, step limit 5 s", job.name, happened, *resumed(job, run_dir, before, whole))


def damaged(job: Job, run_dir: Path, whole: dict[int, float], how: str) -> Row:
    run = Ranks(job, run_dir)
    run.wait_for_step(2 * job.every + job.every // 2)
    run.kill(signal.SIGTERM)
    run.wait()
    before = last_step(run_dir)
    folder = CheckpointFolder(run_dir / "checkpoints")
    previous, newest = folder.steps()[-2:]
    file = sorted(folder.final(newest).glob("__1_*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "one bit flipped" else content[: len(content) // 2])
    _, seconds, joined = resumed(job, run_dir, before, whole)
    text = (run.logs / "rank-0.txt").read_text()
    found = f"warning: {file}: is not what was written" in text and f"resumed from {folder.final(previous)}" in text
    happened = f"named and set aside, resumed from step {previous}" if found else "NOT FOUND"
    return Row(f"newest checkpoint: {how}", job.name, happened, str(before - previous), seconds, joined)


def parquet_vanishes(job: Job, run_dir: Path, whole: dict[int, float]) -> Row:
    """Of a copy of the data, so that what reads it later finds nothing."""
    source = Path(next(text for text in job.overrides if text.startswith("data.path=")).partition("=")[2])
    copy = run_dir.parent / f"{run_dir.name}-data"
    shutil.copytree(source, copy)
    run = Ranks(job, run_dir, f"data.path={copy}")
    run.wait_for_step(job.every + job.every // 2)
    for part in copy.glob("part-*.parquet"):
        part.rename(part.with_suffix(".away"))
    codes = run.wait()
    before, status = last_step(run_dir), read_status(run_dir)
    for part in copy.glob("part-*.away"):
        part.rename(part.with_suffix(".parquet"))
    if status.state == "done":
        return Row("data vanishes", job.name, "had been read to its end", "0", "-", joins(run_dir, whole))
    happened = f"exit codes {codes}, status {status.state}: {said(run).replace(str(copy), 'DATA')}"
    return Row("data vanishes", job.name, happened, *resumed(job, run_dir, before, whole))


def under_torchrun(job: Job, run_dir: Path, whole: dict[int, float], victim: str) -> Row:
    """kill -9 of a worker, which torchrun restarts; of torchrun itself, whose ranks then stop; or TERM to torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=2"]
    logs = run_dir.parent / f"{run_dir.name}-torchrun.txt"
    with logs.open("w") as log:
        agent = subprocess.Popen(
            [sys.executable, *launcher, "-m", "gr", *job.arguments(run_dir)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        wait_for(lambda: last_step(run_dir) > job.every + job.every // 2, f"step of {run_dir}")
        before, killed = last_step(run_dir), time.time()
        workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True)
        pids = [int(pid) for pid in workers.stdout.split()]
        number = signal.SIGTERM if victim == "TERM to torchrun" else signal.SIGKILL
        os.kill(pids[-1] if "worker" in victim else agent.pid, number)
        agent.wait(timeout=PATIENCE)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "end of the workers")
    state = read_status(run_dir).state
    if "worker" in victim:
        again = min(line["time"] for line in records(run_dir) if line["time"] > killed and line["step"] > job.every + 1)
        lost = before - before // job.every * job.every
        happened = f"torchrun restarts all ranks, exit code {agent.returncode}, status {state}"
        return Row(victim, job.name, happened, str(lost), f"{again - killed:.1f}", joins(run_dir, whole))
    happened = f"torchrun's exit code {agent.returncode}; its ranks saved, status {state}"
    return Row(victim, job.name, happened, *resumed(job, run_dir, last_step(run_dir), whole))


def random_kills(job: Job, run_dir: Path, whole: dict[int, float], kills: int) -> Row:
    """kill -9 of one rank or of both at a random moment, start-up and saving included, until there were `kills`."""
    draws, lost, seconds, before = random.Random(0), 0, [], 0
    folder = CheckpointFolder(run_dir / "checkpoints")
    for number in range(kills):
        first = (folder.steps() or [0])[-1] + 1
        run = Ranks(job, run_dir)
        if draws.random() < 0.2:
            time.sleep(draws.uniform(0.0, 1.0))
        else:
            target = first + draws.randrange(8)
            wait_for(lambda run=run, target=target: run.reached(target), f"step {target} of kill {number}")
            seconds.append(run.reached(first) - run.began)
            time.sleep(draws.uniform(0.0, 0.1))
        victims = draws.choice([(0,), (1,), (0, 1)])
        run.kill(signal.SIGKILL, *victims)
        give_up = time.monotonic() + 5  # torchrun ends the others too; one that still waits to join would wait long
        while time.monotonic() < give_up and not all([run.poll(rank) for rank in range(RANKS)]):
            time.sleep(0.01)
        run.kill(signal.SIGKILL)
        if (codes := run.wait()) == [0] * RANKS:
            raise SystemExit(f"finished after {number} kills: give the job more steps")
        before, saved = last_step(run_dir), (folder.steps() or [0])[-1]
        lost += max(0, before - saved)
        print(f"  kill {number + 1}: {victims}, exit codes {codes}, at step {before}, saved {saved}", flush=True)
    happened = f"resumed {kills} times; median start {sorted(seconds)[len(seconds) // 2]:.1f} s"
    last = resumed(job, run_dir, before, whole)
    if damage := [text for step in folder.steps() if (text := find_damage(folder.final(step), SHARED, 0, 1))]:
        raise SystemExit(damage[0])
    return Row(f"{kills} random kill -9", job.name, happened, f"{lost / kills:.1f} a kill", last[1], last[2])


def prepared(folder: Path, steps: int) -> list[Job]:
    """Data and the two jobs."""
    stream = ["--records=8000", "--items=2000", "--categories=20", "--length=64"]
    clicks = ["--rows=100000", "--test-rows=2000"]
    for name, options in (("synthetic", stream), ("clicks", clicks)):
        if (folder / name).exists():
            continue
        subprocess.run([sys.executable, "-m", "gr", "prepare", name, *options, "--out", f"{folder / name}"], check=True)
        for part in (folder / name / "train").glob("part-*.parquet"):
            table = pq.read_table(part)
            # Small row groups, so that training still reads when the data vanishes.
            pq.write_table(table, part, row_group_size=ROW_GROUP[name])
    retrieval = (
        *(f"data.path={folder}/synthetic/train", f"evaluation.path={folder}/synthetic/test", "evaluation.every=null"),
        *("data.max_length=16", "trainer.global_batch_size=16", "task.negatives.count=64", "model.dim=16"),
    )
    ranking = (f"data.path={folder}/clicks/train", f"evaluation.path={folder}/clicks/test")
    return [
        Job("retrieval", "configs/retrieval/smoke.yaml", retrieval, steps, 10),
        Job("ranking", "configs/dlrm/clicks.yaml", ranking, steps, 10),
    ]


def undisturbed(job: Job, folder: Path) -> dict[int, float]:
    run_dir = folder / f"{job.name}-whole-{job.steps}"
    done = run_dir.exists() and read_status(run_dir).state == "done"
    if not done and (codes := Ranks(job, run_dir).wait()) != [0, 0]:
        raise SystemExit(f"{job.name}: exit codes {codes} without a fault; see {run_dir}-logs")
    return losses(run_dir)


def run_all(jobs: list[Job], folder: Path, only: set[str]) -> None:
    for job in jobs:
        whole = undisturbed(job, folder)
        faults: dict[str, Callable[[Path], Row]] = {
            "kill": lambda d, j=job, w=whole: signalled(j, d, w, signal.SIGKILL, 1),
            "kill-main": lambda d, j=job, w=whole: signalled(j, d, w, signal.SIGKILL, 0),
            "term": lambda d, j=job, w=whole: signalled(j, d, w, signal.SIGTERM, 1),
            "usr1": lambda d, j=job, w=whole: signalled(j, d, w, signal.SIGUSR1, 0),
            "int": lambda d, j=job, w=whole: signalled(j, d, w, signal.SIGINT),
            "full": lambda d, j=job, w=whole: full_disk(j, d, w),
            "hang": lambda d, j=job, w=whole: hangs(j, d, w),
            "flip": lambda d, j=job, w=whole: damaged(j, d, w, "one bit flipped"),
            "cut": lambda d, j=job, w=whole: damaged(j, d, w, "a file cut in half"),
            "data": lambda d, j=job, w=whole: parquet_vanishes(j, d, w),
            "worker": lambda d, j=job, w=whole: under_torchrun(j, d, w, "kill -9 of a worker, torchrun"),
            "agent": lambda d, j=job, w=whole: under_torchrun(j, d, w, "kill -9 of torchrun"),
            "agent-term": lambda d, j=job, w=whole: under_torchrun(j, d, w, "TERM to torchrun"),
        }
        for name, inflict in faults.items():
            if only and name not in only:
                continue
            run_dir = folder / f"{job.name}-{name}"
            shutil.rmtree(run_dir, ignore_errors=True)
            print(inflict(run_dir), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Data, runs and logs; made where it is missing.")
    parser.add_argument("--kills", type=int, default=0, help="Only the random kills: how many.")
    parser.add_argument("--only", nargs="*", default=[], help="Only these rows: kill, full, flip, data, agent ...")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| fault | job | what happened | steps lost | seconds to resume | losses |\n" + "|---" * 6 + "|")
    if options.kills:
        job = replace(prepared(options.folder, 3 * options.kills)[0], every=5)
        run_dir = options.folder / f"{job.name}-{options.kills}-kills"
        shutil.rmtree(run_dir, ignore_errors=True)
        print(random_kills(job, run_dir, undisturbed(job, options.folder), options.kills))
    else:
        run_all(prepared(options.folder, 60), options.folder, set(options.only))

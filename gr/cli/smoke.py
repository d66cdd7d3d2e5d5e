"""`gr smoke`: the whole path, as a user would run it: prepare, train on 2 ranks, resume on 1, compare."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.table import Table

from gr.cli.out import say, show
from gr.config import RetrievalConfig, load_config
from gr.errors import GRError, TrainingError

# Summation order differs between world sizes; dropout is off in the smoke config.
LOSS_TOLERANCE = 1e-4
RANKS = 2


@click.command(
    help="Synthetic data -> plan -> train on 2 ranks -> evaluate -> checkpoint -> resume on 1 rank -> evaluate."
)
@click.option("--config", default="retrieval/smoke", show_default=True)
@click.option("--folder", default="runs/smoke", show_default=True, help="Its data/, train/ and resumed/ are replaced.")
def command(config: str, folder: str) -> None:
    began, root = time.monotonic(), Path(folder)
    _clear(root)
    paths = [f"data.path={root}/data/train", f"evaluation.path={root}/data/test"]
    loaded = load_config(config, paths)
    if not isinstance(loaded, RetrievalConfig):
        raise GRError(f"smoke: {config} is a {loaded.kind} experiment; smoke runs retrieval ones")
    gr = [sys.executable, "-m", "gr"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "gr"]
    _run("prepare", [*gr, "prepare", "synthetic", "--out", f"{root}/data", *_stream(loaded.data.max_length)])
    _run("plan", [*gr, "plan", config, *paths, f"--topology=cpux{RANKS}"])
    _run("train on 2 ranks", [*torchrun, "train", config, *paths, f"run_dir={root}/train"])
    steps, every = loaded.trainer.steps, loaded.checkpoint.every
    if steps is None or every is None or every >= steps:
        raise GRError(f"smoke: {config} sets no checkpoint.every below trainer.steps: there is nothing to resume from")
    resumed_at = steps - every
    middle = f"{root}/train/checkpoints/step-{resumed_at:08d}"
    resume = [f"run_dir={root}/resumed", f"checkpoint.load_from={middle}"]
    _run(f"resume on 1 rank from step {resumed_at}", [*gr, "train", config, *paths, *resume])
    _judge(root, resumed_at, time.monotonic() - began)


def _clear(root: Path) -> None:
    """Removes what an earlier smoke run left, and refuses a folder that holds anything else."""
    ours = {"data", "train", "resumed"}
    if strangers := sorted(p.name for p in root.iterdir() if p.name not in ours) if root.is_dir() else []:
        raise GRError(f"smoke: {root} holds {strangers[0]}, which is not of a smoke run: choose another --folder")
    for name in ours:
        shutil.rmtree(root / name, ignore_errors=True)


def _stream(length: int) -> list[str]:
    return ["--records=8000", "--items=2000", "--categories=20", f"--length={length}"]


def _run(title: str, arguments: list[str]) -> None:
    say(f"--- {title}", err=True)
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    status = subprocess.run(arguments, env={"OMP_NUM_THREADS": str(threads), **os.environ}).returncode
    if status:
        raise GRError(f"smoke: '{title}' failed with exit code {status}; its own message is above")


def _judge(root: Path, resumed_at: int, seconds: float) -> None:
    """Prints the summary; raises TrainingError when the run did not learn or the resumed run is another one."""
    runs = {name: _read(root / name) for name in ("train", "resumed")}
    gap = max(
        abs(loss - runs["train"]["loss"][step]) for step, loss in runs["resumed"]["loss"].items() if step > resumed_at
    )
    _print_summary(root, runs, gap, seconds)
    for name, run in runs.items():
        if run["report"]["model"]["hr@10"] <= run["report"]["baselines"]["popularity"]["hr@10"]:
            raise TrainingError(f"smoke: HR@10 of '{name}' does not beat popularity; see {root}/{name}/report.json")
    if not gap <= LOSS_TOLERANCE:
        raise TrainingError(f"smoke: the resumed loss is off by {gap:.2e}, more than {LOSS_TOLERANCE:g}")


def _read(run_dir: Path) -> dict:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": {line["step"]: line["loss"] for line in lines if line["kind"] == "train"},
        "validation": [line for line in lines if line["kind"] == "validation"],
        "rates": [line for line in lines if line["kind"] == "train"],
        "report": json.loads((run_dir / "report.json").read_text()),
    }


def _print_summary(root: Path, runs: dict[str, dict], gap: float, seconds: float) -> None:
    table = Table(title=f"gr smoke: {seconds:.0f} s")
    for column in ("", "HR@10", "NDCG@10"):
        table.add_column(column, justify="left" if not column else "right")
    train, resumed = runs["train"], runs["resumed"]
    rows = {
        "validation, before training": train["validation"][0],
        "validation, after training": train["validation"][-1],
        f"test, trained on {RANKS} ranks": train["report"]["model"],
        "test, resumed on 1 rank": resumed["report"]["model"],
        "test, popularity": train["report"]["baselines"]["popularity"],
        "test, best possible (oracle)": json.loads((root / "data/oracle.json").read_text())["filter_seen=none"],
    }
    for name, metrics in rows.items():
        table.add_row(name, f"{metrics['hr@10']:.4f}", f"{metrics['ndcg@10']:.4f}")
    show(table)
    rates = train["rates"][len(train["rates"]) // 2 :]
    for name in ("examples_per_second", "tokens_per_second"):
        middle = sorted(line[name] for line in rates)[len(rates) // 2]
        say(f"{name.replace('_per_second', '/s')}: {middle:,.0f} (median, {RANKS} ranks)")
    say(f"largest difference of a resumed loss: {gap:.2e}")
    say(f"checkpoint: {train['report']['checkpoint']}")
    say(f"TensorBoard: tensorboard --logdir {root}")

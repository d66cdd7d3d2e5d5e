"""Tables of metrics for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# What fits a terminal of 80 columns; report.json has all of them.
SHOWN = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "mrr")
RANKING_SHOWN = ("ne", "log_loss", "auc", "accuracy", "base_rate", "calibration")

TASK_SHOWN = ("ne", "auc", "gauc", "accuracy", "base_rate", "calibration", "mse", "label_variance")


def print_report(report: Mapping[str, Any], run_dir: str | None) -> None:
    """The model's metrics, with the baselines beside them."""
    console = Console()
    if report["kind"] == "ranking":
        if report["model"]:
            title = f"{report['data']}, {report['model']['examples']:,.0f} examples"
            console.print(metrics_table(title, {"model": report["model"]}, RANKING_SHOWN))
        else:
            console.print("evaluation.path is unset: see the progressive metrics in metrics.jsonl")
    elif report["kind"] == "generative_ranking" and not report["model"]:
        console.print("every event was trained on: see next_window in metrics.jsonl, each window before its training")
    elif report["kind"] == "generative_ranking":
        for task in report["tasks"]:
            metrics = {
                name.removeprefix(f"{task}/"): value
                for name, value in report["model"].items()
                if name.startswith(f"{task}/")
            }
            title = f"{task}, {report['split']} split, {metrics['examples']:,.0f} predictions"
            console.print(metrics_table(title, {"model": metrics}, tuple(n for n in TASK_SHOWN if n in metrics)))
    else:
        title = f"{report['split']} split, {report['users']:,} users, seen items filtered: {report['filter_seen']}"
        console.print(metrics_table(title, {"model": report["model"], **report["baselines"]}))
    console.print(f"checkpoint: {report['checkpoint']} (step {report['step']})", soft_wrap=True)
    if run_dir is not None:
        console.print(f"run folder: {run_dir} (report.json, metrics.jsonl, tensorboard/)", soft_wrap=True)


def metrics_table(title: str, rows: Mapping[str, Mapping[str, float]], shown: tuple[str, ...] = SHOWN) -> Table:
    table = Table(title=title)
    table.add_column("")
    for name in shown:
        table.add_column(name, justify="right")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{metrics[key]:.4f}" for key in shown))
    return table

"""Tables of metrics for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# What fits a terminal of 80 columns; report.json has all of them.
SHOWN = ("hr@1", "hr@10", "hr@50", "hr@200", "ndcg@10", "mrr")


def print_report(report: Mapping[str, Any], run_dir: str | None) -> None:
    """The model's metrics, with the baselines beside them."""
    title = f"{report['split']} split, {report['users']:,} users, seen items filtered: {report['filter_seen']}"
    table = metrics_table(title, {"model": report["model"], **report["baselines"]})
    console = Console()
    console.print(table)
    console.print(f"checkpoint: {report['checkpoint']} (step {report['step']})", soft_wrap=True)
    if run_dir is not None:
        console.print(f"run folder: {run_dir} (report.json, metrics.jsonl, tensorboard/)", soft_wrap=True)


def metrics_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=title)
    table.add_column("")
    for name in SHOWN:
        table.add_column(name, justify="right")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{metrics[key]:.4f}" for key in SHOWN))
    return table

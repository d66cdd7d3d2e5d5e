"""Tables of metrics for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.recipes.base import ReportTable, recipe_class


def print_report(report: Mapping[str, Any], run_dir: str | None) -> None:
    """The model's metrics as its recipe shows them, and where the rest is."""
    console = Console()
    tables = recipe_class(report["kind"]).tables(report)
    for part in [tables] if isinstance(tables, str) else map(metrics_table, tables):
        console.print(part)
    console.print(f"checkpoint: {report['checkpoint']} (step {report['step']})", soft_wrap=True)
    if run_dir is not None:
        console.print(f"run folder: {run_dir} (report.json, metrics.jsonl, tensorboard/)", soft_wrap=True)


def metrics_table(content: ReportTable) -> Table:
    table = Table(title=content.title)
    table.add_column("")
    for name in content.columns:
        table.add_column(name, justify="right")
    for name, metrics in content.rows.items():
        table.add_row(name, *(f"{metrics[key]:.4f}" for key in content.columns))
    return table

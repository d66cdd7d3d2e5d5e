"""Tables of metrics for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from gr.cli.out import cell, say, show
from gr.metrics.writers import shown
from gr.recipes.base import ReportTable, recipe_class


def print_report(report: Mapping[str, Any], run_dir: str | None) -> None:
    """The model's metrics as its recipe shows them, and where the rest is."""
    recipe = recipe_class(report["kind"])
    tables = recipe.tables(report)
    if isinstance(tables, str):
        say(*tables.splitlines())
    else:
        for content in tables:
            show(metrics_table(content))
    say(*(f"null: {why}" for why in report.get("unmeasured", {}).values()))
    say(f"checkpoint: {report['checkpoint']} (step {report['step']})")
    if run_dir is not None:
        say(f"run folder: {run_dir} (report.json, metrics.jsonl, tensorboard/)")
    if verdict := recipe.verdict(report):
        say(verdict)


def metrics_table(content: ReportTable) -> Table:
    table = Table(title=cell(content.title))
    table.add_column("")
    for name in content.columns:
        table.add_column(cell(name), justify="right")
    for name, metrics in content.rows.items():
        table.add_row(cell(name), *(shown(metrics[key]) for key in content.columns))
    return table

"""The report on a plan as one HTML file: no network, no other files, opens from file://."""

import html
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gr.config.inventory import TableConfig
from gr.planner.estimate import MEMORY, PHASES, Estimate, TableShare
from gr.planner.estimate_tables import TABLE_PHASES
from gr.planner.report.figures import headline, imbalance, schedule, straggler, verdict, words, world
from gr.units import percent, size, spans

TEMPLATE = Path(__file__).with_name("page.html")
DIGITS = 5  # digits of every duration in the page


def page(estimate: Estimate) -> str:
    """The whole page. Names of tables are data: they are escaped here and shown only as text."""
    topology = estimate.plan.topology
    title = f"{estimate.plan.inventory.name} on {topology.name}"
    # `<` would let a name end the script element or open a comment in it.
    data = json.dumps(_data(estimate, title), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # Split before filling in: a name may hold a marker.
    head, rest = TEMPLATE.read_text(encoding="utf-8").split("{{title}}")
    body, end = rest.split("{{data}}")
    return "".join((head, html.escape(title), body, data, end))


def _data(estimate: Estimate, title: str) -> dict[str, Any]:
    topology = estimate.plan.topology
    work = straggler(estimate)
    return {
        "title": title,
        "world": world(estimate),
        "fits": bool(estimate.fits),
        "verdict": verdict(estimate),
        "tiles": _tiles(estimate),
        "ranks": len(estimate.host_R),
        "ranksPerHost": topology.ranks_per_host,
        "capacity": topology.hbm_bytes,
        "hostCapacity": topology.host_bytes,
        # The kinds that are alike on every rank come first, at the bottom of a stack.
        "memory": _series(MEMORY[::-1], estimate.memory_MR[::-1].round()),
        "host": _series(("host_memory",), estimate.host_R[None].round()) if estimate.host_R.any() else [],
        "work": _series(TABLE_PHASES, estimate.seconds_PR[[PHASES.index(phase) for phase in TABLE_PHASES]]),
        "bound": _brief(estimate.plan.bound_seconds),
        "phases": _phases(estimate),
        "step": _brief(estimate.step_seconds),
        "links": _series(
            ("same_host", "other_hosts"), np.stack([estimate.intra_bytes_R, estimate.inter_bytes_R]).round()
        ),
        "straggler": {"rank": work.rank, "text": work.explanation()},
        "tables": _tables(estimate),
    }


def _tiles(estimate: Estimate) -> list[tuple[str, str, str]]:
    total_R, capacity = estimate.total_memory_R, estimate.plan.topology.hbm_bytes
    work = straggler(estimate)
    fullest = f"{size(float(total_R.max()))} of {size(capacity)}; max / mean over ranks {imbalance(total_R):.2f}"
    return [
        *headline(estimate),
        ("Fullest rank", percent(float(total_R.max()) / capacity), fullest),
        ("Straggler", f"rank {work.rank}", f"table work {percent(work.excess)} above the mean rank's"),
    ]


def _series(names: tuple[str, ...], values_NR: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"key": name, "label": words(name), "values": [_brief(value) for value in values_R]}
        for name, values_R in zip(names, values_NR.tolist(), strict=True)
    ]


def _brief(value: float) -> float | int:
    """`value` with few digits, because values make most of the page's size: bytes whole, seconds to five digits."""
    return int(value) if float(value).is_integer() else float(f"{value:.{DIGITS}g}")


def _phases(estimate: Estimate) -> list[dict[str, Any]]:
    """Rows of the phase table. hidden: seconds beside other phases, from hiddenStart on. rank: the slowest, or None."""
    return [
        {
            "label": words(phase),
            "kind": "tables" if phase in ("lookup", "update") else "dense" if phase.startswith("dense") else "links",
            "hiddenStart": _brief(hidden_start),
            "start": _brief(start),
            "slowest": _brief(seconds_R.max()),
            "rank": int(seconds_R.argmax()) if np.ptp(seconds_R) else None,
            "mean": _brief(seconds_R.mean()),
            "hidden": _brief(hidden),
        }
        for phase, (hidden_start, start), seconds_R, hidden in zip(
            PHASES, schedule(estimate), estimate.seconds_PR, estimate.hidden_P, strict=True
        )
    ]


def _tables(estimate: Estimate) -> list[list[Any]]:
    """Rows of the table of tables, in the columns of page.html."""
    configs = {table.name: table for table in estimate.plan.inventory.tables}
    every = partial(_ranks, everyone=len(estimate.host_R))
    return [[*_row(configs[share.name], share), every(share)] for share in estimate.tables]


def _row(table: TableConfig, share: TableShare) -> list[Any]:
    return [
        share.name,
        share.sharding_type,
        share.kernel,
        table.kind,
        table.dtype,
        table.rows,
        table.dim,
        share.copies,
        share.shards,
        share.bytes,
        share.largest_shard_bytes,
        _brief(share.seconds),
    ]


def _ranks(share: TableShare, everyone: int) -> str:
    return "all" if len(set(share.ranks)) == everyone else spans(set(share.ranks))

"""`gr plan --serve`: which card holds which tables of a model that is served, and what a batch takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

from gr.cli.out import cell, say, show
from gr.config.inventory import InventoryConfig
from gr.errors import ConfigError, ServingError, nearest
from gr.planner.estimate_serving import SERVED_DTYPES, ServingEstimate, estimate_serving, smallest_serving
from gr.planner.topology import Topology
from gr.units import duration, size

if TYPE_CHECKING:
    from gr.serving.package.layout import Manifest

DOES_NOT_FIT = 3
EXAMPLES = 64
NAMES_SHOWN = 4


def plan_serving(
    inventory: InventoryConfig, topology: Topology, serve: str | None, examples: int | None, smallest: bool
) -> int:
    """Prints the plan; the exit code. serve: the tables' dtype. Raises ConfigError for another one."""
    if serve is None:
        raise ConfigError("--examples is of a model that is served: add --serve int8, or leave it out")
    if serve not in SERVED_DTYPES:
        raise ConfigError(f"--serve {serve}: no dtype of served tables; {nearest(serve, SERVED_DTYPES, 'dtypes')}")
    examples = examples or EXAMPLES
    try:
        if smallest:
            cards, estimated = smallest_serving(inventory, topology, serve, examples=examples)
        else:
            cards = topology.ranks
            estimated = estimate_serving(inventory, topology, serve, cards=cards, examples=examples)
    except ServingError as error:
        say(f"error: {error}", err=True)
        return DOES_NOT_FIT
    show(_table(estimated, f"{inventory.name}, {serve} tables on {cards} cards of {topology.name}"))
    say(*_lines(estimated, cards, examples))
    if smallest:
        say(f"smallest: {cards} card{'s' * (cards > 1)} of {topology.name}")
    return 0


def plan_package(folder: Path) -> None:
    """Prints what the cards of a package hold. Raises ServingError where the folder is no package."""
    from gr.serving.package.layout import read_current, read_manifest

    say_tables(read_manifest(folder, read_current(folder)))


def say_tables(manifest: "Manifest") -> None:
    """Prints the bytes of a version's tables, and what each card has of them."""
    from gr.serving.tables.card_tables import BATCH

    tables, cards = manifest.tables.values(), manifest.cards
    stored, full = sum(table.bytes for table in tables), sum(4 * table.rows * table.dim for table in tables)
    kinds = ", ".join(sorted({table.dtype for table in tables}))
    say(f"tables: {kinds}, {stored:,} of {full:,} bytes ({stored / full:.2f})")
    if cards is None:
        return
    for place, card in enumerate(cards.cards):
        names = _first(card.tables)
        say(f"card {place}: {card.bytes:,} bytes, lookups of {BATCH:,} rows {card.cost:,.0f} us: {names}")
    say(
        f"balance: the fullest card has {cards.bytes_over_bound:.3f} times, and the dearest takes "
        f"{cards.cost_over_bound:.3f} times, the least that any partition could"
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" * (len(names) > NAMES_SHOWN))


def _table(estimated: ServingEstimate, title: str) -> Table:
    right = [Column(head, justify="right") for head in ("card", "tables of", "lookups", "sends")]
    table = Table(*right, "tables", title=cell(title))
    done = estimated.partition
    rows = zip(done.tables_K, done.bytes_K, estimated.lookup_seconds_K, estimated.sent_bytes_K, strict=True)
    for card, (tables, stored, seconds, sent) in enumerate(rows):
        listed = cell(_first([part.shown for part in sorted(tables, key=lambda part: -part.bytes)]))
        table.add_row(str(card), size(stored), duration(seconds), size(sent), listed)
    return table


def _lines(estimated: ServingEstimate, cards: int, examples: int) -> list[str]:
    done = estimated.partition
    fullest, total = max(done.bytes_K), sum(done.bytes_K)
    return [
        f"tables {size(total)}; fullest card {size(fullest)} of {size(estimated.cap_bytes)}, and each has the dense "
        f"part, {size(estimated.dense_bytes)}",
        f"balance: the dearest card takes {done.cost_over_bound:.3f} times the least that any partition could",
        f"a batch of {examples} takes about {duration(estimated.latency_seconds)}: "
        f"lookups {duration(max(estimated.lookup_seconds_K))}, transfer {duration(estimated.transfer_seconds)}, "
        f"dense part {duration(estimated.dense_seconds)}; without queues and the host's work",
    ]
